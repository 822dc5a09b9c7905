"""How rows of a captured step are laid out and padded: within every buffer, whatever the budgets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="the engine needs torch")

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from neo.runtime.cuda_graphs import padded
from neo.runtime.step_inputs import RelayRows


def batch(gpu: int, cpu: int, lanes: int) -> Any:
    numbers = np.zeros((3, lanes), dtype=np.int32)
    relay = RelayRows(gpu + cpu, numbers, numbers) if lanes else None
    return SimpleNamespace(gpu=range(gpu), cpu=range(cpu), relay=relay)


@given(gpu=st.integers(0, 520), cpu=st.integers(0, 40), lanes=st.integers(0, 16), room=st.integers(0, 60))
def test_rows_fit_the_buffers(gpu: int, cpu: int, lanes: int, room: int) -> None:
    """Those of nobody too: attention's buffers hold so many decodes and no more."""
    if lanes:
        cpu = 0  # a plan has one or the other
    decodes, most = gpu + room // 2, gpu + cpu + room + 16
    (at,) = padded([batch(gpu, cpu, lanes)], [most], decodes)
    assert gpu <= at.gpu_rows <= decodes
    assert (at.cpu_rows >= cpu, at.relay_rows >= lanes) == (True, True)
    assert at.rows == at.gpu_rows + at.cpu_rows + at.relay_rows <= most
    assert (at.gpu, at.cpu, at.relay) == (0, at.gpu_rows, at.gpu_rows + at.cpu_rows)


def test_all_rows_together_are_a_number_that_products_are_tuned_for() -> None:
    (at,) = padded([batch(21, 0, 3)], [512], 256)
    assert (at.gpu_rows, at.relay_rows, at.rows) == (28, 4, 32)
    (at,) = padded([batch(9, 0, 0)], [25], 9)
    assert at.rows == 9, "nine decodes are all that there is room for"
