from dataclasses import replace

import numpy as np
import pytest
from cost_works import MACHINE, MODEL, PLAIN, plain
from hypothesis import given
from hypothesis import strategies as st

from neo.core.graph import OpKind, Work
from neo.cost.contention import SharedRate
from neo.cost.roofline import Roofline

rates = st.floats(1.0, 100.0)
amounts = st.floats(0.0, 1000.0)


def fluid(left: list[float], alone: list[float], shared: list[float]) -> list[float]:
    """End times of two flows, by walking from event to event."""
    ends, now = [0.0, 0.0], 0.0
    while any(x > 0 for x in left):
        both = all(x > 0 for x in left)
        speed = shared if both else alone
        step = min(left[i] / speed[i] for i in (0, 1) if left[i] > 0)
        now += step
        for i in (0, 1):
            if left[i] > 0:
                left[i] -= speed[i] * step
                if left[i] <= 1e-9:
                    left[i], ends[i] = 0.0, now
    return ends


@given(amounts, amounts, rates, rates, rates, rates)
def test_closed_form_equals_the_fluid_simulation(
    own: float, other: float, alone: float, alone2: float, shared: float, shared2: float
) -> None:
    shared, shared2 = min(shared, alone), min(shared2, alone2)
    expected = fluid([own, other], [alone, alone2], [shared, shared2])[0]
    assert SharedRate(alone, shared).seconds(own, other / shared2) == pytest.approx(
        expected, rel=1e-6, abs=1e-6
    )


@given(st.lists(amounts, min_size=1), amounts, rates, rates)
def test_arrays_equal_scalars(own: list[float], other: float, alone: float, shared: float) -> None:
    flow = SharedRate(alone, shared)
    assert flow.seconds_array(np.array(own), other).tolist() == [flow.seconds(x, other) for x in own]


def test_company_never_helps() -> None:
    assert SharedRate(10.0, 20.0).seconds(100.0, 1e9) == SharedRate(10.0, 20.0).seconds(100.0, 0.0)


@pytest.mark.parametrize(("own", "beside"), [(10**7, 0), (10**7, 10**6), (10**7, 10**7), (10**6, 10**9)])
def test_copies_share_the_duplex_bandwidth(own: int, beside: int) -> None:
    expected = fluid([float(own), float(beside)], [1e10, 1e10], [0.8e10, 0.8e10])[0]
    for kind in (OpKind.SWAP_IN, OpKind.SWAP_OUT, OpKind.STREAM):
        found = plain().seconds(kind, Work(bytes=own, beside_bytes=beside))
        assert found == pytest.approx(1e-6 + expected)  # the link's latency
    for kind in (OpKind.SEND, OpKind.RECV):
        assert plain().seconds(kind, Work(bytes=own, beside_bytes=beside)) == pytest.approx(expected)


@pytest.mark.parametrize("beside", [0, 10**5, 10**6, 10**9])
def test_cpu_attention_slows_while_copies_move(beside: int) -> None:
    work = Work(sequences=1, kv_tokens=50_000, beside_bytes=beside)
    own = 50_000 * 800.0
    expected = fluid([own, float(beside)], [1e11, 1e10], [5e10, 1e10])[0]
    assert plain().seconds(OpKind.CPU_ATTN, work) == pytest.approx(expected)


def test_asymmetric_links_keep_their_own_limits() -> None:
    machine = replace(MACHINE, h2d_bandwidth=5e9, d2h_bandwidth=2e10, duplex_bandwidth=2e10)
    model = Roofline(MODEL, machine, **PLAIN)
    expected = fluid([1e7, 1e7], [2e10, 5e9], [1e10, 5e9])
    assert model.seconds(OpKind.SEND, Work(bytes=10**7, beside_bytes=10**7)) == pytest.approx(expected[0])
    assert model.seconds(OpKind.RECV, Work(bytes=10**7, beside_bytes=10**7)) == pytest.approx(expected[1])
