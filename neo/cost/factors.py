"""The factors of the roofline: every number in it that is not a peak of the machine or a size of the model.

Each field carries its unit, what it means and its source. A machine overrides defaults under
``[efficiency.NAME]`` of its preset; the user overrides both (``--cost-opt NAME=VALUE``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

from neo.core.errors import InputError
from neo.core.plugins import close_matches

_RATIO = "ratio"
_LEAST, _MOST = 1e-12, 1e12  # beyond these, times become infinite


def _factor(default: float, unit: str, doc: str, source: str) -> float:
    value: float = field(default=default, metadata={"unit": unit, "doc": doc, "source": source})
    return value


@dataclass(frozen=True, slots=True)
class RooflineFactors:
    """Achieved shares of peaks (units ``ratio``), fixed costs (``s``) and counts; ``rows`` lists them."""

    matmul_efficiency: float = _factor(
        0.80,
        _RATIO,
        "achieved share of gpu_flops in large matrix products",
        "H100 SXM: 794.5 of 989 TFLOPS (ml-engineering, maximum achievable matmul FLOPS)",
    )
    matmul_half_tokens: float = _factor(
        0.0,
        "tokens",
        "rows at which a matrix product reaches half of its peak rate (Hockney's n_1/2); 0 is off",
        "off: small batches are bound by reading weights, which the roofline prices; no public figure",
    )
    hbm_efficiency: float = _factor(
        0.875,
        _RATIO,
        "achieved share of gpu_bandwidth in streaming kernels",
        "measured: 4.2 of 4.8 TB/s in a device-to-device copy on an H200",
    )
    prefill_attention_efficiency: float = _factor(
        0.62,
        _RATIO,
        "achieved share of gpu_flops in causal prefill attention",
        "FlashAttention-2 (arXiv 2307.08691): 50 to 73% of peak on A100; the middle",
    )
    decode_attention_bandwidth_efficiency: float = _factor(
        0.85,
        _RATIO,
        "share of the achieved HBM bandwidth that paged decode attention reaches",
        "estimate: gathers of 16-token blocks and the split-K reduction; replace by a measured table",
    )
    cpu_read_efficiency: float = _factor(
        0.80,
        _RATIO,
        "achieved share of cpu_bandwidth in sequential reads by all cores",
        "usual STREAM share of the DRAM peak on server CPUs, 0.75 to 0.85; 1 where it is measured",
    )
    cpu_attention_efficiency: float = _factor(
        0.77,
        _RATIO,
        "share of the achieved read bandwidth that CPU decode attention reaches with grouped queries",
        "measured: 0.76 to 0.78, ISPC prototype, 32 query and 8 KV heads, two Sapphire Rapids cores",
    )
    cpu_attention_efficiency_mha: float = _factor(
        0.96,
        _RATIO,
        "the same where every query head has its own KV head",
        "measured: 0.96 to 0.99, ISPC prototype, 32 query and 32 KV heads, two Sapphire Rapids cores",
    )
    cpu_flops_efficiency: float = _factor(
        0.26,
        _RATIO,
        "achieved share of cpu_flops in CPU decode attention (loads and conversion beside each FMA)",
        "measured: 12.6 GB/s on one Sapphire Rapids core with 4 FLOP per byte = 50 of about 192 GFLOP/s",
    )
    cpu_attention_s: float = _factor(
        1.1e-6,
        "s",
        "entering and leaving the CPU worker pool, per call",
        "measured: hot OpenMP region, two cores",
    )
    cpu_attention_sequence_s: float = _factor(
        0.2e-6,
        "s",
        "walking the block table and merging partial results, per sequence",
        "estimate: a few KiB of accumulators per sequence from L2; replace by a measured table",
    )
    link_efficiency: float = _factor(
        0.79,
        _RATIO,
        "achieved share of the h2d, d2h and duplex bandwidths",
        "25 of 31.5 GB/s on PCIe Gen4 x16 (BaM authors, measured); presets with measured links set 1",
    )
    kernel_launch_s: float = _factor(
        3.4e-6, "s", "one kernel launched from the host", "measured: raw launches on h200-16c"
    )
    graph_node_s: float = _factor(
        0.85e-6, "s", "one kernel inside a replayed CUDA graph", "measured: graph replay on h200-16c"
    )
    graphs: float = _factor(
        0.0,
        _RATIO,
        "share of kernels that run inside CUDA graphs",
        "0: an eager engine, as in the paper's baselines; 1 for an engine that captures its steps",
    )
    kernels_embed: float = _factor(1, "kernels", "kernels of EMBED", "count: row gather")
    kernels_pre: float = _factor(
        4, "kernels", "kernels of PRE", "count: norm, QKV product, rotary, KV append"
    )
    kernels_prefill: float = _factor(1, "kernels", "kernels of prefill attention", "count: one varlen call")
    kernels_decode: float = _factor(
        2, "kernels", "kernels of decode attention", "count: split-K and reduction"
    )
    kernels_post: float = _factor(
        5, "kernels", "kernels of POST", "count: output product, residual + norm, up, activation, down"
    )
    kernels_head: float = _factor(3, "kernels", "kernels of HEAD", "count: norm, logits, sampling")
    sample_s: float = _factor(
        4.6e-6,
        "s",
        "sampled ids to the host and synchronisation, per step",
        "measured: GPU-CPU-GPU handover without payload on h200-16c",
    )
    handover_s: float = _factor(
        3.3e-6,
        "s",
        "fixed part of SEND and of RECV: flag, latency and start of the copy",
        "measured: half of the 6.6 us of a GPU-CPU-GPU handover with 12 KiB on h200-16c",
    )
    copy_launch_s: float = _factor(
        3.4e-6, "s", "issuing one SWAP or STREAM copy", "as kernel_launch_s; the link's latency comes on top"
    )
    schedule_s: float = _factor(
        2e-4,
        "s",
        "planning a step and preparing its inputs, fixed part",
        "estimate of a Python control plane (NEO reports under 3 ms a step); replace by a measured value",
    )
    schedule_per_sequence_s: float = _factor(
        1e-6, "s", "the same, per request of the step", "estimate: a handful of Python operations per request"
    )
    gpu_link_efficiency: float = _factor(
        0.84,
        _RATIO,
        "achieved share of gpu_link_bandwidth",
        "380 of 450 GB/s on H100 NVLink, p2pBandwidthLatencyTest (NVIDIA/nccl issue 1264)",
    )
    allreduce_s: float = _factor(
        1e-5,
        "s",
        "fixed part of ALLREDUCE: launch and synchronisation of the ranks",
        "estimate: order of a small NCCL all-reduce over NVLink (about 10 us)",
    )

    @staticmethod
    @cache
    def names() -> tuple[str, ...]:
        """Names of all factors."""
        return tuple(f.name for f in fields(RooflineFactors))

    def with_values(self, values: Mapping[str, Any], where: str) -> RooflineFactors:
        """A copy with ``values`` (numbers or their text) set; ``where`` names their origin in errors.

        Raises:
            InputError: unknown factor (with close matches), not a number, or out of range.
        """
        units = {f.name: f.metadata["unit"] for f in fields(self)}
        checked = {}
        for name, raw in values.items():
            if name not in units:
                raise InputError(f"{where}: unknown factor '{name}'{close_matches(name, units)}")
            checked[name] = _number(name, raw, units[name], where)
        return replace(self, **checked)

    def rows(self) -> list[dict[str, Any]]:
        """Every factor with name, value, unit, meaning and the source of its default."""
        return [{"name": f.name, "value": getattr(self, f.name), **f.metadata} for f in fields(self)]


def _number(name: str, raw: Any, unit: str, where: str) -> float:
    """``raw`` as a number within the bounds of its unit; ``graphs``, the one share of a count, may be 0."""
    try:
        value = math.nan if isinstance(raw, bool) else float(raw)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{where}: {name}={raw!r} is not a number") from None
    if unit != _RATIO:
        good, bounds = 0.0 <= value <= _MOST, f"within 0 .. {_MOST:g} ({unit})"
    elif name == "graphs":
        good, bounds = 0.0 <= value <= 1.0, "a share from 0 to 1"
    else:
        good, bounds = _LEAST <= value <= 1.0, f"a share above 0 (at least {_LEAST:g}) and at most 1"
    if not good:
        raise InputError(f"{where}: {name}={raw} must be {bounds}")
    return value
