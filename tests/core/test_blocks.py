"""BlockPool: counts of layer-blocks, by owner."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.core.blocks import BlockPool, blocks_for
from neo.core.errors import InputError
from neo.core.request import Tier


def pool(blocks: int = 10, layers: int = 4, staging: int = 0) -> BlockPool:
    return BlockPool(Tier.GPU, blocks, layers, block_size=16, staging_layers=staging)


@pytest.mark.parametrize(("blocks", "remain"), [(54, 52), (1650, 1600), (33, 32), (32, 31), (1, 0), (0, 0)])
def test_staging_takes_one_layer_of_the_pool(blocks: int, remain: int) -> None:
    """The paper's table: of 54 and 1650 blocks, NEO keeps 52 and 1600 with 32 layers."""
    got = pool(blocks, layers=32, staging=1)
    assert (got.blocks, got.total, got.staging_blocks) == (remain, remain * 32, remain)


@given(st.integers(0, 10_000), st.integers(1, 128), st.integers(1, 4))
def test_what_remains_and_its_staging_fit_in_what_there_is(blocks: int, layers: int, staging: int) -> None:
    got = pool(blocks, layers, staging)
    assert got.total + got.staging_blocks * staging <= blocks * layers
    assert (got.blocks + 1) * (layers + staging) > blocks * layers, "no more could remain"


def test_without_staging_everything_is_for_requests() -> None:
    got = pool(54, layers=32)
    assert (got.blocks, got.total, got.tokens, got.staging_blocks) == (54, 54 * 32, 54 * 16, 0)


@given(st.integers(0, 10_000), st.integers(1, 64))
def test_blocks_for_is_the_least_that_holds(tokens: int, size: int) -> None:
    blocks = blocks_for(tokens, size)
    assert blocks * size >= tokens
    assert (blocks - 1) * size < tokens


def test_take_and_release_by_owner() -> None:
    got = pool()
    got.take("a", 8)
    got.take("a", 4)
    got.take("b", 20)
    assert (got.held("a"), got.held("b"), got.held("c"), got.used, got.free) == (12, 20, 0, 32, 8)
    assert got.release("a", 5) == 5
    assert got.holders() == {"a": 7, "b": 20}
    assert got.release("a") == 7
    assert got.release("a") == 0
    assert got.release("b", 20) == 20
    assert (got.holders(), got.used, got.free) == ({}, 0, 40)


def test_more_than_is_free_cannot_be_taken() -> None:
    got = pool()
    got.take("a", 30)
    with pytest.raises(AssertionError, match="gpu pool: 11 layer-blocks for b, 10 of 40 free"):
        got.take("b", 11)
    assert (got.holders(), got.used) == ({"a": 30}, 30)


def test_more_than_is_held_cannot_be_released() -> None:
    got = pool()
    got.take("a", 30)
    with pytest.raises(AssertionError, match="a holds 30 layer-blocks, cannot release 31"):
        got.release("a", 31)
    with pytest.raises(AssertionError, match="b holds 0"):
        got.release("b", 1)
    assert (got.holders(), got.used) == ({"a": 30}, 30)


@pytest.mark.parametrize("bad", [{"blocks": -1}, {"layers": 0}, {"block_size": 0}, {"staging_layers": -1}])
def test_what_is_not_a_pool(bad: dict[str, int]) -> None:
    sizes = {"blocks": 4, "layers": 2, "block_size": 16, "staging_layers": 0, **bad}
    with pytest.raises(InputError, match="is not a pool") as caught:
        BlockPool(Tier.CPU, **sizes)
    (name, value), *_ = bad.items()
    assert f"{name}={value}" in str(caught.value)


def test_holders_is_a_copy() -> None:
    got = pool()
    got.take("a", 3)
    got.holders().clear()
    assert got.held("a") == 3
