"""How many KV blocks fit on the GPUs and in host memory once weights and activations have their place."""

from __future__ import annotations

from typing import Any

from neo.core.errors import InputError
from neo.core.specs import HardwareSpec, ModelSpec
from neo.core.view import Limits

GPU_MEMORY_UTILIZATION = 0.9  # the usual default of serving engines (vLLM's gpu_memory_utilization)
CPU_MEMORY_FRACTION = (
    0.45  # NEO (arXiv 2411.01142) gives 120 of 256 GB to host KV; the rest is OS, weights, staging
)
_LOGIT_BYTES = 4  # logits are kept in fp32 for sampling
_GIB = 2**30


def activation_bytes(model: ModelSpec, limits: Limits) -> int:
    """Peak activation bytes of one rank in a step of ``max_batch_tokens`` rows.

    Alive at once in a layer: residual and its norm (2 * hidden), q, k, v, and the feed-forward's inner
    activations (gate and up, or one matrix), the last two divided over the ranks; plus fp32 logits of
    ``max_seqs`` rows::

        tokens * dtype_bytes * (2 * hidden + (qkv + (mlp_matrices - 1) * intermediate) / tp)
          + max_seqs * vocab * 4 / tp
    """
    qkv = model.head_dim * (model.heads + 2 * model.kv_heads)
    inner = (model.mlp_matrices - 1) * model.intermediate
    row = model.dtype_bytes * (2 * model.hidden + -(-(qkv + inner) // model.tp))
    logits = limits.max_seqs * _LOGIT_BYTES * -(-model.vocab // model.tp)
    return limits.max_batch_tokens * row + logits


def kv_budget(
    model: ModelSpec,
    hardware: HardwareSpec,
    limits: Limits,
    gpu_memory_utilization: float = GPU_MEMORY_UTILIZATION,
    cpu_memory_fraction: float = CPU_MEMORY_FRACTION,
) -> tuple[int, int, dict[str, Any]]:
    """KV blocks of ``limits.block_size`` tokens (all layers, all ranks) on the GPUs and on the host.

    GPU, per rank: ``memory * gpu_memory_utilization - weights / tp - activations``, divided by a
    block's bytes on a rank. Host: ``memory * cpu_memory_fraction`` divided by a block's bytes.

    Returns:
        GPU blocks, CPU blocks, and every number of the calculation in bytes (JSON-serialisable).

    Raises:
        InputError: a fraction outside its range, more ranks than GPUs, or a model that leaves no room for
            one block; with the numbers.
    """
    for name, value in (
        ("gpu_memory_utilization", gpu_memory_utilization),
        ("cpu_memory_fraction", cpu_memory_fraction),
    ):
        if not 0.0 <= value <= 1.0:
            raise InputError(f"{name} must be 0 to 1, got {value}")
    if model.tp > hardware.gpu_count:
        raise InputError(
            f"hardware '{hardware.name}' has {hardware.gpu_count} GPU(s), "
            f"tensor parallelism {model.tp} needs more"
        )
    block_bytes = limits.block_size * model.kv_bytes_per_token
    usable = int(hardware.gpu_memory_bytes * gpu_memory_utilization)
    weights = -(-model.weight_bytes // model.tp)
    activations = activation_bytes(model, limits)
    room = usable - weights - activations
    gpu_blocks = room * model.tp // block_bytes
    host = int(hardware.cpu_memory_bytes * cpu_memory_fraction)
    cpu_blocks = host // block_bytes
    if gpu_blocks < 1:
        raise InputError(
            f"model '{model.name}' does not fit on {hardware.gpu} ('{hardware.name}'): per GPU "
            f"{usable / _GIB:.2f} GiB usable "
            f"({hardware.gpu_memory_bytes / _GIB:.2f} x {gpu_memory_utilization}) "
            f"- {weights / _GIB:.2f} weights - {activations / _GIB:.2f} activations of "
            f"{limits.max_batch_tokens} tokens leaves {room / _GIB:.2f} GiB, one KV block needs "
            f"{block_bytes / model.tp / _GIB:.3f}"
        )
    explanation = {
        "gpu_memory_bytes": hardware.gpu_memory_bytes,
        "gpu_memory_utilization": gpu_memory_utilization,
        "gpu_usable_bytes": usable,
        "weight_bytes_per_gpu": weights,
        "activation_bytes_per_gpu": activations,
        "kv_bytes_per_gpu": room,
        "block_bytes": block_bytes,
        "tp": model.tp,
        "cpu_memory_bytes": hardware.cpu_memory_bytes,
        "cpu_memory_fraction": cpu_memory_fraction,
        "cpu_kv_bytes": host,
        "gpu_blocks": gpu_blocks,
        "cpu_blocks": cpu_blocks,
        "gpu_kv_tokens": gpu_blocks * limits.block_size,
        "cpu_kv_tokens": cpu_blocks * limits.block_size,
    }
    return gpu_blocks, cpu_blocks, explanation
