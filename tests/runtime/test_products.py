"""Products of few rows: those that are computed as four are the same."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the engine needs torch")

import torch

from neo.runtime.products import linear


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(8, 16), (4096, 1040)], ids=["small", "large"])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_are_those_of_a_product_in_float64(rows: int, shape: tuple[int, int], biased: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, shape[1], generator=generator), torch.randn(*shape, generator=generator)
    bias = torch.randn(shape[0], generator=generator) if biased else None
    found = linear(x, weight, bias)
    expected = x.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    assert found.shape == (rows, shape[0])
    assert torch.allclose(found.double(), expected, atol=1e-3)
