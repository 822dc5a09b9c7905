import json
from dataclasses import replace

import numpy as np
import pytest
from cost_works import COPIES, FIELDS, MACHINE, MODEL, grown, kinds, plain, works
from hypothesis import given
from hypothesis import strategies as st

from neo.core.errors import InputError
from neo.core.graph import OpKind, Work
from neo.cost.factors import RooflineFactors
from neo.cost.interface import CostModel
from neo.cost.presets import load_hardware, load_model
from neo.cost.roofline import Roofline


def test_is_a_cost_model() -> None:
    assert isinstance(plain(), CostModel)
    assert plain().vectorized is True
    assert json.dumps(plain().describe())


def test_dense_is_bound_by_weights_at_few_rows() -> None:
    # PRE: 1000 * 100 * (10 + 2*2) = 1.4e6 params = 2.8e6 bytes; one row reads 1000 and writes 1400 elements,
    # its neighbours move 2 * 1000 + 2 * 1400.
    assert plain().seconds(OpKind.PRE, Work(1)) == pytest.approx((2.8e6 + 2 * 2400 + 2 * 4800) / 1e12)


def test_dense_is_bound_by_flops_at_many_rows() -> None:
    rows = 10_000
    # POST: 1000*100*10 + 3*1000*2000 = 7e6 params; neighbours move 4 * 1000 + 3 * 2000 elements a row.
    expected = 2 * rows * 7e6 / 1e14 + rows * 2 * 10_000 / 1e12
    assert plain().seconds(OpKind.POST, Work(rows)) == pytest.approx(expected)


def test_launches_and_half_saturation_come_on_top() -> None:
    base = plain().seconds(OpKind.PRE, Work(10_000))
    slow = plain(kernel_launch_s=1e-5, kernels_pre=4).seconds(OpKind.PRE, Work(10_000))
    assert slow - base == pytest.approx(4e-5)
    half = plain(matmul_half_tokens=10_000).seconds(OpKind.PRE, Work(10_000))
    assert half - base == pytest.approx(2 * 10_000 * 1.4e6 / 1e14)
    graph = plain(kernel_launch_s=1e-5, graph_node_s=1e-6, graphs=1, kernels_pre=4)
    assert graph.seconds(OpKind.PRE, Work(10_000)) - base == pytest.approx(4e-6)


def test_prefill_attention() -> None:
    # 4 * heads * head_dim * length * (start + (length + 1) / 2) FLOPs
    flops = 4 * 1000 * (2000 * (1000 + 2001 / 2))
    work = Work(chunks=((1000, 2000),))
    assert plain().seconds(OpKind.GPU_ATTN, work) == pytest.approx(flops / 1e14)
    # one row far into the context is bound by reading the prefix: 800 bytes of KV a token and layer
    work = Work(chunks=((100_000, 1),))
    assert plain().seconds(OpKind.GPU_ATTN, work) == pytest.approx(100_001 * 800 / 1e12)
    both = Work(chunks=((1000, 2000), (100_000, 1)))
    assert plain().seconds(OpKind.GPU_ATTN, both) == pytest.approx(flops / 1e14 + 100_001 * 800 / 1e12)


def test_chunks_of_a_prompt_add_up_to_the_whole() -> None:
    whole = plain().seconds(OpKind.GPU_ATTN, Work(chunks=((0, 6000),)))
    parts = plain().seconds(OpKind.GPU_ATTN, Work(chunks=((0, 2000), (2000, 4000))))
    assert parts == pytest.approx(whole)


def test_decode_attention() -> None:
    work = Work(sequences=10, kv_tokens=50_000)
    rows = 10 * 2 * 1000 * 2
    assert plain().seconds(OpKind.GPU_ATTN, work) == pytest.approx((50_000 * 800 + rows) / 1e12)
    half = plain(decode_attention_bandwidth_efficiency=0.5)
    assert half.seconds(OpKind.GPU_ATTN, work) == pytest.approx((50_000 * 800 * 2 + rows) / 1e12)


def test_cpu_attention_is_bound_by_memory_or_arithmetic() -> None:
    work = Work(sequences=10, kv_tokens=50_000)
    assert plain().seconds(OpKind.CPU_ATTN, work) == pytest.approx(50_000 * 800 / 1e11)
    slow = plain(cpu_flops_efficiency=0.1)
    assert slow.seconds(OpKind.CPU_ATTN, work) == pytest.approx(50_000 * 4000 / 1e11)
    fixed = plain(cpu_attention_s=1e-3, cpu_attention_sequence_s=1e-4)
    assert fixed.seconds(OpKind.CPU_ATTN, work) == pytest.approx(50_000 * 800 / 1e11 + 2e-3)


def test_cpu_attention_efficiency_depends_on_grouping() -> None:
    every = {"cpu_attention_efficiency": 0.5, "cpu_attention_efficiency_mha": 0.25}
    work = Work(sequences=1, kv_tokens=1000)
    assert plain(**every).seconds(OpKind.CPU_ATTN, work) == pytest.approx(1000 * 800 / 5e10)
    alone = plain(replace(MODEL, kv_heads=10), **every)
    assert alone.seconds(OpKind.CPU_ATTN, work) == pytest.approx(1000 * 4000 / 2.5e10)


def test_copies() -> None:
    model = plain(handover_s=3e-6, copy_launch_s=5e-6)
    work = Work(bytes=10**7)
    assert model.seconds(OpKind.SEND, work) == pytest.approx(3e-6 + 1e-3)
    assert model.seconds(OpKind.RECV, work) == pytest.approx(3e-6 + 1e-3)
    for kind in (OpKind.SWAP_IN, OpKind.SWAP_OUT, OpKind.STREAM):
        assert model.seconds(kind, work) == pytest.approx(6e-6 + 1e-3)


def test_head_embed_schedule() -> None:
    model = plain(sample_s=1e-5, schedule_s=1e-4, schedule_per_sequence_s=1e-6)
    # 5000 * 1000 params, one row: product 2 * 1000 + 4 * 5000, neighbours 2 * 2000 + 4 * 5000 bytes
    assert model.seconds(OpKind.HEAD, Work(1, 1)) == pytest.approx(1e-5 + (1e7 + 22_000 + 24_000) / 1e12)
    assert model.seconds(OpKind.EMBED, Work(100)) == pytest.approx(100 * 2 * 2000 / 1e12)
    assert model.seconds(OpKind.SCHEDULE, Work(100, 50)) == pytest.approx(1.5e-4)


def test_ranks_split_the_gpu_but_not_the_cpu() -> None:
    one, two = plain(), plain(replace(MODEL, tp=2))
    decode = Work(sequences=10, kv_tokens=50_000)
    assert two.seconds(OpKind.GPU_ATTN, decode) == pytest.approx(one.seconds(OpKind.GPU_ATTN, decode) / 2)
    assert two.seconds(OpKind.CPU_ATTN, decode) == one.seconds(OpKind.CPU_ATTN, decode)
    for kind in COPIES:
        assert two.seconds(kind, Work(bytes=10**6)) < one.seconds(kind, Work(bytes=10**6))
    assert one.seconds(OpKind.ALLREDUCE, Work(bytes=10**8)) == 0.0
    # two all-reduces a layer: 2 * (1e-5 + 2 hops of 2 us), and 2 (tp - 1) / tp = 1 times the bytes
    fixed = plain(replace(MODEL, tp=2), allreduce_s=1e-5)
    assert fixed.seconds(OpKind.ALLREDUCE, Work(bytes=10**8)) == pytest.approx(2 * (1e-5 + 4e-6) + 1e-3)


def test_nothing_costs_nothing() -> None:
    model = Roofline(replace(MODEL, tp=2), MACHINE)
    for kind in OpKind:
        if kind is not OpKind.SCHEDULE:
            assert model.seconds(kind, Work()) == 0.0
    assert model.seconds(OpKind.SCHEDULE, Work()) == RooflineFactors().schedule_s


@given(
    kinds, works, st.sampled_from(FIELDS), st.integers(1, 100_000), st.sampled_from(["g5.4xlarge", "2xh100"])
)
def test_monotone_in_every_field(kind: OpKind, work: Work, field: str, by: int, machine: str) -> None:
    hardware = load_hardware(machine)
    model = Roofline(load_model("llama-3.1-8b", tp=hardware.gpu_count), hardware)
    less, more = model.seconds(kind, work), model.seconds(kind, grown(work, field, by))
    assert 0.0 <= less <= more


@given(
    st.sampled_from([OpKind.GPU_ATTN, OpKind.CPU_ATTN]),
    works,
    st.lists(st.integers(0, 2**50), min_size=1, max_size=8),
    st.sampled_from(["g4dn.4xlarge", "h200-16c"]),
)
def test_arrays_equal_scalars_bitwise(kind: OpKind, work: Work, kv: list[int], machine: str) -> None:
    model = Roofline(load_model("qwen3-8b"), load_hardware(machine))
    found = model.seconds(kind, work._replace(kv_tokens=np.array(kv, dtype=np.int64)))
    assert found.dtype == np.float64
    assert found.shape == (len(kv),)
    assert found.tolist() == [model.seconds(kind, work._replace(kv_tokens=k)) for k in kv]


def test_factors_layer_user_over_machine_over_default() -> None:
    machine = replace(MACHINE, efficiency={"matmul_efficiency": 0.5, "hbm_efficiency": 0.5})
    factors = Roofline(MODEL, machine, hbm_efficiency="0.25").factors
    assert (factors.matmul_efficiency, factors.hbm_efficiency) == (0.5, 0.25)
    assert factors.link_efficiency == RooflineFactors().link_efficiency


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"matmul_eficiency": "0.5"}, "unknown factor 'matmul_eficiency', did you mean 'matmul_efficiency'"),
        ({"matmul_efficiency": "fast"}, "matmul_efficiency='fast' is not a number"),
        ({"matmul_efficiency": "0"}, "matmul_efficiency=0 must be a share above 0"),
        ({"matmul_efficiency": "1.01"}, r"matmul_efficiency=1.01 must be .* at most 1"),
        ({"matmul_efficiency": "1e-300"}, "matmul_efficiency=1e-300 must be"),
        ({"matmul_efficiency": "nan"}, "matmul_efficiency=nan must be"),
        ({"matmul_efficiency": True}, "matmul_efficiency=True must be"),
        ({"graphs": "1.5"}, "graphs=1.5 must be a share from 0 to 1"),
        ({"kernel_launch_s": "inf"}, r"kernel_launch_s=inf must be within 0 \.\. 1e\+12 \(s\)"),
        ({"kernel_launch_s": "1e308"}, "kernel_launch_s=1e308 must be within"),
        ({"kernel_launch_s": "-1e-6"}, "kernel_launch_s=-1e-6 must be within 0"),
        ({"handover_s": "-1"}, "within 0"),
        ({"handover_s": "nan"}, "within 0"),
        ({"graphs": "2"}, "0 to 1"),
    ],
)
def test_bad_factors(option: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Roofline(MODEL, MACHINE, **option)
    assert "\n" not in str(caught.value)


def test_too_many_ranks() -> None:
    with pytest.raises(InputError, match=r"has 1 GPU\(s\), tensor parallelism 2 needs more"):
        Roofline(replace(MODEL, tp=2), replace(MACHINE, gpu_count=1))
    with pytest.raises(InputError, match="gpu_link_bandwidth"):
        Roofline(replace(MODEL, tp=2), replace(MACHINE, gpu_link_bandwidth=0.0))


def test_every_factor_has_unit_meaning_and_source() -> None:
    for row in RooflineFactors().rows():
        assert row["unit"] in ("ratio", "s", "kernels", "tokens")
        assert row["doc"]
        assert row["source"]
