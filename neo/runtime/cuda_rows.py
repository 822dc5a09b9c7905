"""The rows of one sub-batch on the GPU: their inputs, what is computed of them, and the kernels between.

Buffers are as large as a step may get and are made once; a step uses their first rows. Every kernel's
arguments are described once too, and per layer only the pointers that differ are changed: that is all the
Python between two launches, and what a CUDA graph captures stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from neo.runtime import cuda_kernels as kernels
from neo.runtime.cuda_linear import Products
from neo.runtime.kv_memory import KVMemory
from neo.runtime.model import Model
from neo.runtime.step_inputs import BatchInputs
from neo.runtime.weights import LayerWeights

_NO_SLOT = -1  # of rows whose KV does not go into the GPU's cache with PRE


@dataclass(slots=True)
class Layout:
    """Where the rows of a sub-batch stand; in a padded step some rows belong to nobody.

    Attributes:
        rows: in all.
        gpu, gpu_rows: first row and number of the decodes on the GPU.
        cpu, cpu_rows: of those on the CPU.
        relay, relay_rows: of relayed ones.
    """

    rows: int
    gpu: int
    gpu_rows: int
    cpu: int
    cpu_rows: int
    relay: int = 0
    relay_rows: int = 0


class Inputs:
    """Numbers of a step's rows, one copy to the device: tokens, positions, slots, decodes, late, counts.

    Late are slots of those decodes on the GPU whose new KV is appended with attention, not with PRE: for
    captured steps, where nothing but what lies here tells who they are.

    On the host there are two of them, taken in turn: a step's may still be on their way when the next one's
    are written.
    """

    def __init__(self, rows: int, decodes: int, device: torch.device) -> None:
        sizes = [rows, rows, rows, decodes, decodes, decodes, 4]
        self._hosts = [torch.zeros(sum(sizes), dtype=torch.int32).pin_memory() for _ in range(2)]
        self._device = torch.zeros_like(self._hosts[0], device=device)
        self._cuts = np.cumsum(sizes)[:-1]
        self._turn()
        (
            self.device_tokens,
            self.device_positions,
            self.device_slots,
            self.device_decode_slots,
            self.device_decode_lengths,
            self.device_late_slots,
            self.device_counts,
        ) = torch.split(self._device, sizes)

    def _turn(self) -> None:
        self._hosts.reverse()
        host = np.split(self._hosts[0].numpy(), self._cuts)
        self.tokens, self.positions, self.slots, *decodes, self.counts = host
        self.decode_slots, self.decode_lengths, self.late_slots = decodes

    def fill(self, batch: BatchInputs, at: Layout) -> None:
        """Write the rows of a sub-batch at their places; rows of nobody get token 0 and no slot."""
        self._turn()
        n, d, c = at.rows, batch.gpu, batch.cpu
        tokens, positions, slots = self.tokens[:n], self.positions[:n], self.slots[:n]
        slots.fill(_NO_SLOT)
        if n == len(batch.tokens):
            tokens[:], positions[:] = batch.tokens, batch.positions
            slots[batch.append.rows] = batch.append.slots
        else:
            tokens.fill(0)
            positions.fill(0)
            for source, first in ((d, at.gpu), (c, at.cpu)):
                to = slice(first, first + len(source))
                tokens[to] = batch.tokens[source.rows]
                positions[to] = source.positions
            early = len(d) - len(batch.late)
            slots[at.gpu : at.gpu + early] = d.slots[:early]
            if (relay := batch.relay) is not None:
                to = slice(at.relay, at.relay + relay.lanes)
                tokens[to] = batch.tokens[relay.rows]
                positions[to] = batch.positions[relay.rows]
        self.decode_lengths[: at.gpu_rows].fill(0)
        self.decode_slots[: at.gpu_rows].fill(0)
        self.decode_lengths[: len(d)] = d.lengths
        self.decode_slots[: len(d)] = d.slots
        self.late_slots[: at.gpu_rows].fill(_NO_SLOT)
        if len(batch.late) and not batch.chunks:  # those of chunks are told otherwise
            self.late_slots[len(d) - len(batch.late) : len(d)] = batch.late.slots
        self.counts[0] = len(c)

    def send(self) -> None:
        """Copy to the device, on the current stream."""
        self._device.copy_(self._hosts[0], non_blocking=True)


class Rows:
    """Buffers and kernels of one sub-batch.

    Args:
        model: on the GPU.
        memory: the GPU's KV memory.
        rows: of a step at most.
        decodes: GPU decodes of a step at most (0: this sub-batch never has any).
        product: of the layers' matrices. Where it adds, steps of few rows do without kernels for norms, which
            are in the matrices then (``neo.runtime.cuda_fold``).
    """

    def __init__(self, model: Model, memory: KVMemory, rows: int, decodes: int, product: Products) -> None:
        config, dtype, device = model.config, model.dtype, model.device
        self.model = model
        self._product = product
        self.capacity = rows
        self.inputs = Inputs(rows, max(1, decodes), device)

        def buffer(width: int) -> Tensor:
            return torch.zeros((rows, width), dtype=dtype, device=device)

        self.heads, self.kv_heads, self.dim = config.heads, config.kv_heads, config.head_dim
        q_width, kv_width = self.heads * self.dim, self.kv_heads * self.dim
        self.hidden, self.delta, self.x = buffer(config.hidden), buffer(config.hidden), buffer(config.hidden)
        self.qkv = buffer(q_width + 2 * kv_width)
        self.attended = buffer(q_width)
        self.gate_up, self.act = buffer(2 * config.intermediate), buffer(config.intermediate)
        self.cos, self.sin = buffer(self.dim), buffer(self.dim)
        self.q = self.qkv[:, :q_width].view(rows, self.heads, self.dim)
        self.k = self.qkv[:, q_width : q_width + kv_width].view(rows, self.kv_heads, self.dim)
        self.v = self.qkv[:, q_width + kv_width :].view(rows, self.kv_heads, self.dim)
        self.out = self.attended.view(rows, self.heads, self.dim)
        self.cache = kernels.cache_of(memory.tensor, memory.block_size)
        self._describe(decodes)

    def _describe(self, decodes: int) -> None:
        """The kernels' arguments; what differs between layers and steps is set when they are launched."""
        config, model, inputs = self.model.config, self.model, self.inputs
        weights = model.weights.layers[0]
        ones = torch.ones_like(self.cos)
        self._folded = False  # the step that is launched
        self._scale = kernels.scale_of(self.hidden, config.rms_eps)
        self._norm = kernels.add_rms_norm(self.hidden, self.delta, weights.input_norm, self.x, config.rms_eps)
        self._silu = kernels.silu_mul(self.gate_up, self.act)
        # Any table: its address changes with every layer.
        table = torch.zeros((1, 1), dtype=torch.int32, device=model.device)
        common = (table, inputs.device_slots, inputs.device_positions)
        rotary = model.rotary
        self._angles = kernels.rope_angles(
            inputs.device_positions, rotary.signed, rotary.scale, self.cos, self.sin
        )
        heads = (self.q, self.k, self.v)
        norms = weights.qk_norm
        extra = kernels.QkvWeights(
            weights.qkv_bias,
            None if norms is None else norms[0],
            None if norms is None else norms[self.heads],
            config.rms_eps,
        )
        self._qkv = kernels.qkv_rope_append(self.cache, self.qkv, extra, self.cos, self.sin, *heads, *common)
        # Rows that are rotated already: cosine 1 and sine 0 leave them as they are.
        self._late = kernels.qkv_rope_append(
            self.cache, self.qkv, kernels.QkvWeights(), ones, torch.zeros_like(ones), *heads, *common
        )
        self.attention: kernels.Attention | None = None
        if decodes:
            size = kernels.decode_workspace(self.cache, decodes, self.heads)
            workspace = torch.zeros(max(16, size), dtype=torch.uint8, device=model.device)
            q, out = self.q[:decodes], self.out[:decodes]
            self.attention = kernels.decode(
                self.cache,
                q,
                out,
                table,
                inputs.device_decode_lengths,
                workspace,
                inputs.device_decode_slots,
            )

    # -- a step -------------------------------------------------------------------------------------------

    def begin(self, at: Layout, latest: Tensor) -> None:
        """Embedding and angles of the rows, from the inputs on the device; how attention is dealt out.

        ``latest``: int32 [slots], the tokens sampled last, for rows whose token is a ``pending_token``.
        """
        n, inputs = at.rows, self.inputs
        self.at = at
        self._folded = n <= self._product.most_added
        scale = self._scale if self._folded else kernels.NO_SCALE
        self._silu.args.scale = self._qkv.args.scale = scale
        given = inputs.device_tokens[:n]
        tokens = torch.where(given < 0, latest.index_select(0, (-1 - given).clamp_min_(0)), given)
        torch.index_select(self.model.weights.embedding, 0, tokens, out=self.hidden[:n])
        self._angles.args.rows = n
        self._angles()
        self._norm.args.rows = self._silu.args.rows = self._qkv.args.rows = n
        if self.attention is not None and at.gpu_rows:
            args, by = self.attention.attend.args, self.qkv.element_size()
            args.rows = at.gpu_rows
            args.q = self.qkv.data_ptr() + at.gpu * self.qkv.stride(0) * by
            args.out = self.attended.data_ptr() + at.gpu * self.attended.stride(0) * by
            self.attention.plan()

    def pre(self, layer: int, weights: LayerWeights, table: tuple[int, int], first: bool) -> None:
        """Norm, projection, rotation, append. ``table``: the layer's, its address and its row's length."""
        n = self.at.rows
        x = self.hidden
        if not self._folded:
            norm, x = self._norm.args, self.x
            norm.delta = None if first else self.delta.data_ptr()
            norm.weight = weights.input_norm.data_ptr()
            self._norm()
        self._product(x[:n], weights.qkv, None, self.qkv[:n])
        args = self._qkv.args
        args.early = self._settled(first)
        args.block_tables, args.table_stride = table
        args.bias = None if weights.qkv_bias is None else weights.qkv_bias.data_ptr()
        if weights.qk_norm is not None:
            args.q_norm = weights.qk_norm[0].data_ptr()
            args.k_norm = weights.qk_norm[self.heads].data_ptr()
        self._qkv()

    def append(self, row: int, count: int, slots: Tensor, positions: Tensor, table: tuple[int, int]) -> None:
        """KV of ``count`` rows, rotated already, into the cache; slots and positions: int32 on the device."""
        args, by = self._late.args, self.qkv.element_size()
        address = self.qkv.data_ptr() + row * self.qkv.stride(0) * by
        q_bytes, kv_bytes = self.heads * self.dim * by, self.kv_heads * self.dim * by
        args.qkv = args.q_out = address
        args.k_out, args.v_out = address + q_bytes, address + q_bytes + kv_bytes
        args.slots, args.positions = slots.data_ptr(), positions.data_ptr()
        args.rows = count
        args.block_tables, args.table_stride = table
        self._late()

    def append_late(self, table: tuple[int, int]) -> None:
        """KV of the decodes on the GPU that the inputs on the device call late."""
        at, inputs = self.at, self.inputs
        if at.gpu_rows:
            positions = inputs.device_positions[at.gpu :]
            self.append(at.gpu, at.gpu_rows, inputs.device_late_slots, positions, table)

    def _settled(self, first: bool) -> bool:
        """Whether what kernels read ahead of their wait (inputs, angles, plan, older KV) is there by then.

        A product of cuBLAS's may let the next kernel begin before it has waited itself, so that a kernel
        behind products may begin while the one ahead of them runs. Of ours, a norm and SiLU let none begin
        before they have waited for all ahead of them; rotation and append lets attention begin at once. At
        most two products follow each other (down, and qkv of the next layer), so when rotation or attention
        begins, all ahead of the last norm or SiLU has ended. Only in the first layer without norm is there
        neither between the kernels that write inputs, angles and plan and those that read them.
        """
        return not (self._folded and first)

    def attend(self, layer: int, table: tuple[int, int], early: bool) -> None:
        """Decode attention of the GPU decodes in one layer.

        ``early``: nothing but this layer's append writes to the cache in this step.
        """
        if self.attention is None or not self.at.gpu_rows:
            return
        args = self.attention.attend.args
        args.block_tables, args.table_stride = table
        args.early = early and self._settled(layer == 0)
        self.attention.attend()

    def post(self, layer: int, weights: LayerWeights) -> None:
        """Output projection and feed-forward network; see `ended` for what comes of it."""
        n = self.at.rows
        if self._folded:
            hidden = self.hidden[:n]
            self._product(self.attended[:n], weights.out, None, hidden, add=True)
            self._product(hidden, weights.gate_up, None, self.gate_up[:n])
            self._silu()
            self._product(self.act[:n], weights.down, None, hidden, add=True)
            return
        self._product(self.attended[:n], weights.out, weights.out_bias, self.delta[:n])
        norm = self._norm.args
        norm.delta, norm.weight = self.delta.data_ptr(), weights.post_norm.data_ptr()
        self._norm()
        self._product(self.x[:n], weights.gate_up, weights.gate_up_bias, self.gate_up[:n])
        self._silu()
        self._product(self.act[:n], weights.down, weights.down_bias, self.delta[:n])

    def ended(self, index: Tensor | None = None) -> Tensor:
        """Hidden states behind the last layer, of these rows (None: all); not to be changed."""
        n = self.at.rows
        hidden, delta = self.hidden[:n], self.delta[:n]
        if index is not None:
            hidden, delta = hidden.index_select(0, index), delta.index_select(0, index)
        return hidden if self._folded else hidden + delta
