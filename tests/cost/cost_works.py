"""Strategies and helpers shared by the cost tests."""

from hypothesis import strategies as st

from neo.core.graph import OpKind, Work
from neo.core.specs import HardwareSpec, ModelSpec
from neo.cost.factors import RooflineFactors
from neo.cost.roofline import Roofline

COPIES = (OpKind.SEND, OpKind.RECV, OpKind.SWAP_OUT, OpKind.SWAP_IN, OpKind.STREAM)

kinds = st.sampled_from(list(OpKind))
chunk_lists = st.lists(st.tuples(st.integers(0, 100_000), st.integers(1, 20_000)), max_size=4).map(tuple)
works = st.builds(
    Work,
    tokens=st.integers(0, 40_000),
    sequences=st.integers(0, 2_000),
    kv_tokens=st.integers(0, 5_000_000),
    bytes=st.integers(0, 10**10),
    chunks=chunk_lists,
    beside_bytes=st.integers(0, 10**10),
    layers=st.integers(1, 128),
)


def grown(work: Work, field: str, by: int) -> Work:
    """``work`` with more of one field (chunks: every chunk longer, or one more)."""
    if field == "chunks":
        longer = tuple((start, length + by) for start, length in work.chunks)
        return work._replace(chunks=longer or ((0, by + 1),))
    if field == "starts":
        return work._replace(chunks=tuple((start + by, length) for start, length in work.chunks))
    return work._replace(**{field: getattr(work, field) + by})


FIELDS = ("tokens", "sequences", "kv_tokens", "bytes", "chunks", "starts", "beside_bytes")

# Round numbers, so that every expected value below can be checked by hand.
MODEL = ModelSpec("toy", 4, 1000, 10, 2, 100, 2000, 5000, 4096)
MACHINE = HardwareSpec(
    name="toy",
    gpu="g",
    cpu="c",
    gpu_memory_bytes=16e9,
    gpu_bandwidth=1e12,
    gpu_flops=1e14,
    cpu_cores=8,
    cpu_memory_bytes=64e9,
    cpu_bandwidth=1e11,
    cpu_bandwidth_beside_copy=5e10,
    cpu_flops=1e12,
    h2d_bandwidth=1e10,
    d2h_bandwidth=1e10,
    duplex_bandwidth=1.6e10,
    link_latency=1e-6,
    gpu_count=2,
    gpu_link_bandwidth=1e11,
    gpu_link_latency=2e-6,
)
PLAIN = {
    **{f["name"]: 1.0 for f in RooflineFactors().rows() if f["unit"] == "ratio" and f["name"] != "graphs"},
    **{f["name"]: 0.0 for f in RooflineFactors().rows() if f["unit"] != "ratio"},
}


def plain(model: ModelSpec = MODEL, **factors: float) -> Roofline:
    return Roofline(model, MACHINE, **{**PLAIN, **factors})
