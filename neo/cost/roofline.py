"""The roofline cost model: every operation from peaks of the machine, sizes of the model and stated factors.

The roofline bound (Williams, Waterman, Patterson, CACM 2009) prices a kernel at the longer of its arithmetic
and its memory traffic; launch costs come on top::

    seconds = launches + max(FLOPs / (peak * efficiency), bytes / (bandwidth * efficiency))

All work is that of one tensor-parallel rank: FLOPs and bytes of the model are divided by ``model.tp``, except
CPU attention, for one host serves all ranks. ``neo.cost.factors`` holds every number that is neither a peak
nor a size; ``docs/cost-models.md`` derives the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from neo.core.errors import InputError
from neo.core.graph import OpKind, Work
from neo.core.specs import HardwareSpec, ModelSpec
from neo.cost.contention import SharedRate
from neo.cost.factors import RooflineFactors

_LOGIT_BYTES = 4  # logits are kept in fp32 for sampling
_ALLREDUCES = 2  # one ALLREDUCE operation stands for the two of a layer: after attention and after the FFN


class _Dense:
    """A matrix product with its element-wise neighbours, as a function of its rows.

    ``launch + rows * element_wise + max(rows * flop_s + half, weight_s + rows * act_s)``: the product follows
    the roofline of 2 * rows * params FLOPs (Kaplan et al., arXiv 2001.08361) against weights and
    activations read and written; norms, rotary, activations and residuals are bound by memory and follow one
    another.
    """

    __slots__ = ("act_s", "element_s", "flop_s", "half_s", "launch_s", "weight_s")

    def __init__(
        self,
        params: float,
        act_bytes: float,
        element_bytes: float,
        kernels: float,
        model: ModelSpec,
        rates: _Rates,
    ) -> None:
        self.flop_s = 2.0 * params / rates.matmul
        self.half_s = rates.factors.matmul_half_tokens * self.flop_s
        self.weight_s = params * model.dtype_bytes / rates.hbm
        self.act_s = act_bytes / rates.hbm
        self.element_s = element_bytes / rates.hbm
        self.launch_s = kernels * rates.launch_s

    def seconds(self, rows: int) -> float:
        if rows <= 0:
            return 0.0
        compute = rows * self.flop_s + self.half_s
        memory = rows * self.act_s + self.weight_s
        return self.launch_s + rows * self.element_s + (compute if compute > memory else memory)


class _Rates:
    """Achieved rates: bytes/s, FLOP/s and seconds after all factors."""

    def __init__(self, model: ModelSpec, hardware: HardwareSpec, factors: RooflineFactors) -> None:
        self.factors = factors
        self.matmul = hardware.gpu_flops * factors.matmul_efficiency
        self.hbm = hardware.gpu_bandwidth * factors.hbm_efficiency
        self.prefill = hardware.gpu_flops * factors.prefill_attention_efficiency
        self.decode_hbm = self.hbm * factors.decode_attention_bandwidth_efficiency
        self.launch_s = (
            factors.graphs * factors.graph_node_s + (1.0 - factors.graphs) * factors.kernel_launch_s
        )
        links = factors.link_efficiency * model.tp  # the links of all ranks' GPUs add up
        self.h2d = hardware.h2d_bandwidth * links
        self.d2h = hardware.d2h_bandwidth * links
        self.duplex = hardware.duplex_bandwidth * links
        grouped = model.heads != model.kv_heads
        attention = factors.cpu_attention_efficiency if grouped else factors.cpu_attention_efficiency_mha
        self.cpu = hardware.cpu_bandwidth * factors.cpu_read_efficiency * attention
        self.cpu_beside = hardware.cpu_bandwidth_beside_copy * factors.cpu_read_efficiency * attention
        self.cpu_flops = hardware.cpu_flops * factors.cpu_flops_efficiency
        self.gpu_link = hardware.gpu_link_bandwidth * factors.gpu_link_efficiency


class Roofline:
    """Prices operations from a machine's peaks and a model's sizes.

    Args:
        model: what runs; ``model.tp`` ranks.
        hardware: where it runs; its ``efficiency`` overrides the factors' defaults.
        **factors: further overrides, numbers or their text (``matmul_efficiency=0.7``).

    Raises:
        InputError: unknown factor or bad value; more ranks than GPUs; no link between the GPUs.
    """

    vectorized = True

    def __init__(self, model: ModelSpec, hardware: HardwareSpec, **factors: float | str) -> None:
        if model.tp > hardware.gpu_count:
            raise InputError(
                f"hardware '{hardware.name}' has {hardware.gpu_count} GPU(s), "
                f"tensor parallelism {model.tp} needs more"
            )
        if model.tp > 1 and hardware.gpu_link_bandwidth <= 0:
            raise InputError(
                f"hardware '{hardware.name}': tensor parallelism needs gpu_link_bandwidth above 0"
            )
        self.model = model
        self.hardware = hardware
        base = RooflineFactors().with_values(hardware.efficiency, f"hardware '{hardware.name}', efficiency")
        self.factors = base.with_values(factors, "cost model roofline")
        self._overridden = sorted(factors)
        rates = _Rates(model, hardware, self.factors)
        self._set_dense(rates)
        self._set_attention(rates)
        self._set_links(rates)
        self._price: dict[OpKind, Callable[[Work], Any]] = {
            OpKind.SCHEDULE: self._schedule,
            OpKind.EMBED: self._embed,
            OpKind.PRE: self._pre,
            OpKind.GPU_ATTN: self._gpu_attention,
            OpKind.SEND: self._send,
            OpKind.CPU_ATTN: self._cpu_attention,
            OpKind.RECV: self._recv,
            OpKind.POST: self._post,
            OpKind.SWAP_OUT: self._swap_out,
            OpKind.SWAP_IN: self._swap_in,
            OpKind.STREAM: self._swap_in,
            OpKind.ALLREDUCE: self._allreduce,
            OpKind.HEAD: self._head,
        }

    def seconds(self, kind: OpKind, work: Work) -> Any:
        """Seconds of one operation in one layer; see ``neo.cost.interface.CostModel``."""
        return self._price[kind](work)

    def describe(self) -> dict[str, Any]:
        """Machine, model, every factor with its value and source, and which were set by the user."""
        hardware = asdict(self.hardware)
        return {
            "cost_model": "roofline",
            "model": self.model.name,
            "tp": self.model.tp,
            "hardware": hardware,
            "factors": self.factors.rows(),
            "overridden": self._overridden,
        }

    # -- coefficients ---------------------------------------------------------------------------------------

    def _set_dense(self, rates: _Rates) -> None:
        """Activation traffic in elements per row and rank; each kernel reads its input and writes its output.

        PRE: norm (read, write hidden), product (read hidden, write q, k, v), rotary and append (read, write
        them). POST: product (read heads, write hidden), residual + norm (read 2, write 2 hidden), up (read
        hidden, write gate and up), activation (read them, write one), down (read it, write hidden).
        HEAD: norm (read, write hidden), product (read hidden, write logits), sampling (read logits).
        """
        m, f = self.model, rates.factors
        size, tp = m.dtype_bytes, m.tp
        qkv = m.head_dim * (m.heads + 2 * m.kv_heads) / tp
        heads = m.head_dim * m.heads / tp
        inner = m.intermediate / tp
        ups = m.mlp_matrices - 1
        self._pre_op = _Dense(
            m.qkv_params / tp,
            size * (m.hidden + qkv),
            size * (2 * m.hidden + 2 * qkv),
            f.kernels_pre,
            m,
            rates,
        )
        product = heads + 3 * m.hidden + (ups + 1) * inner
        element = 4 * m.hidden + (ups + 1) * inner
        self._post_op = _Dense(m.post_params / tp, size * product, size * element, f.kernels_post, m, rates)
        vocab = m.vocab / tp
        self._head_op = _Dense(
            vocab * m.hidden,
            size * m.hidden + _LOGIT_BYTES * vocab,
            size * 2 * m.hidden + _LOGIT_BYTES * vocab,
            f.kernels_head,
            m,
            rates,
        )
        self._sample_s = f.sample_s
        self._embed_launch_s = f.kernels_embed * rates.launch_s
        self._embed_s = 2 * m.hidden * size / rates.hbm  # gather: read and write one row
        self._schedule_s = f.schedule_s
        self._schedule_sequence_s = f.schedule_per_sequence_s

    def _set_attention(self, rates: _Rates) -> None:
        m, f = self.model, rates.factors
        flops = 4.0 * m.heads * m.head_dim  # one query against one key: QK^T and PV, 2 FLOP per element each
        kv_bytes = m.kv_bytes_per_token_layer
        self._prefill_launch_s = f.kernels_prefill * rates.launch_s
        self._prefill_flop_s = flops / m.tp / rates.prefill
        self._prefill_kv_s = kv_bytes / m.tp / rates.hbm
        self._decode_launch_s = f.kernels_decode * rates.launch_s
        self._decode_kv_s = kv_bytes / m.tp / rates.decode_hbm
        row_bytes = 2 * m.heads * m.head_dim * m.dtype_bytes  # a query in, an output out
        self._decode_row_s = row_bytes / m.tp / rates.hbm
        self._cpu_launch_s = f.cpu_attention_s
        self._cpu_sequence_s = f.cpu_attention_sequence_s
        self._cpu_flop_s = flops / rates.cpu_flops
        self._kv_bytes = float(kv_bytes)
        self._cpu_memory = SharedRate(rates.cpu, rates.cpu_beside)
        # Which way the copies go is not known to CPU_ATTN: they count as moving one way, at the mean rate.
        self._cpu_copy_s = 2.0 / (rates.h2d + rates.d2h)

    def _set_links(self, rates: _Rates) -> None:
        m, f, hw = self.model, rates.factors, self.hardware
        self._handover_s = f.handover_s
        self._copy_s = f.copy_launch_s + hw.link_latency
        half = rates.duplex / 2
        self._to_gpu = SharedRate(rates.h2d, half)
        self._to_host = SharedRate(rates.d2h, half)
        tp = m.tp
        self._allreduce_s = _ALLREDUCES * (f.allreduce_s + 2 * (tp - 1) * hw.gpu_link_latency)
        self._allreduce_byte_s = 2 * (tp - 1) / tp / rates.gpu_link if tp > 1 else 0.0

    # -- prices: positions of Work are (tokens, sequences, kv_tokens, bytes, chunks, beside_bytes, layers) --

    def _schedule(self, work: Work) -> float:
        return self._schedule_s + work[1] * self._schedule_sequence_s

    def _embed(self, work: Work) -> float:
        return self._embed_launch_s + work[0] * self._embed_s if work[0] else 0.0

    def _pre(self, work: Work) -> float:
        return self._pre_op.seconds(work[0])

    def _post(self, work: Work) -> float:
        return self._post_op.seconds(work[0])

    def _head(self, work: Work) -> float:
        return self._head_op.seconds(work[1]) + self._sample_s if work[1] else 0.0

    def _gpu_attention(self, work: Work) -> Any:
        """Prefill chunks by causal FLOPs against KV bytes (Dao, arXiv 2307.08691), decode by KV bytes."""
        _, sequences, kv, _, chunks, _, _ = work
        prefill = self._prefill(chunks) if chunks else 0.0
        if not sequences:
            return self._without_sequences(kv, prefill)
        fixed = prefill + self._decode_launch_s + sequences * self._decode_row_s
        return fixed + kv * self._decode_kv_s

    def _prefill(self, chunks: tuple[tuple[int, int], ...]) -> float:
        """A query at position p reads p + 1 keys: sum over a chunk = length * (start + (length + 1) / 2)."""
        total = self._prefill_launch_s
        for start, length in chunks:
            compute = length * (start + 0.5 * (length + 1)) * self._prefill_flop_s
            memory = (start + length) * self._prefill_kv_s
            total += compute if compute > memory else memory
        return total

    def _without_sequences(self, kv: Any, prefill: float) -> Any:
        """KV without a sequence is no decode: nothing but the prefill, in the shape of ``kv``."""
        return np.full(kv.shape, prefill) if isinstance(kv, np.ndarray) else prefill

    def _cpu_attention(self, work: Work) -> Any:
        """max(bytes / bandwidth, FLOPs / peak) over all ranks' heads; bandwidth falls while copies move."""
        _, sequences, kv, _, _, beside, layers = work
        if not sequences:
            return self._without_sequences(kv, 0.0)
        fixed = self._cpu_launch_s / layers + sequences * self._cpu_sequence_s
        own, copies_s = kv * self._kv_bytes, beside * self._cpu_copy_s
        compute = kv * self._cpu_flop_s
        if isinstance(kv, np.ndarray):
            return fixed + np.maximum(compute, self._cpu_memory.seconds_array(own, copies_s))
        memory = self._cpu_memory.seconds(own, copies_s)
        return fixed + (compute if compute > memory else memory)

    def _send(self, work: Work) -> float:
        nbytes = work[3]
        other = work[5] * self._to_gpu.per_byte_shared
        return self._handover_s + self._to_host.seconds(nbytes, other) if nbytes else 0.0

    def _recv(self, work: Work) -> float:
        nbytes = work[3]
        other = work[5] * self._to_host.per_byte_shared
        return self._handover_s + self._to_gpu.seconds(nbytes, other) if nbytes else 0.0

    def _swap_out(self, work: Work) -> float:
        nbytes = work[3]
        other = work[5] * self._to_gpu.per_byte_shared
        return self._copy_s + self._to_host.seconds(nbytes, other) if nbytes else 0.0

    def _swap_in(self, work: Work) -> float:
        nbytes = work[3]
        other = work[5] * self._to_host.per_byte_shared
        return self._copy_s + self._to_gpu.seconds(nbytes, other) if nbytes else 0.0

    def _allreduce(self, work: Work) -> float:
        """Ring: every rank sends 2 (tp - 1) / tp of the bytes (Patarasuk, Yuan, JPDC 2009)."""
        nbytes = work[3]
        if not nbytes or self.model.tp == 1:
            return 0.0
        return self._allreduce_s + nbytes * self._allreduce_byte_s
