"""CPU attention of a GPU's host as a step asks for it: layer after layer, few sequences in each.

    python benchmarks/gpu/host_attention.py

For numbers of sequences of a length, the time of 32 layers that follow each other without a pause, told to
the library in one job, and the rate at which KV is read, beside the rate of plain reading by as many threads.
First layer behind layer, as a GPU asks for them that waits for each answer; then as stages that are all there
when the job begins, as with relayed decodes: these share runs of the threads.
Shapes of Llama-3.1-8B in bf16; KV in blocks of 16 tokens, strewn over memory far larger than the caches.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics

import numpy as np
import torch

from neo.runtime import cpu_library as c
from neo.runtime.cpu_kernels import Pool
from neo.runtime.cpu_worker import Worker
from neo.runtime.kv_memory import KVMemory
from neo.runtime.machine import read_bandwidth, usable_cores
from neo.runtime.native_args import fill_append, fill_decode

LAYERS, HEADS, KV_HEADS, DIM, BLOCK = 32, 32, 8, 128, 16


def measure(
    memory: KVMemory, worker: Worker, sequences: int, tokens: int, rounds: int, busy: bool, together: bool
) -> list[float]:
    """Seconds of all layers, in each round; ``together``: as stages of one layer."""
    random = np.random.default_rng(0)
    blocks = -(-tokens // BLOCK)
    tables = np.zeros((LAYERS, sequences, blocks), dtype=np.int32)
    free = random.permutation(memory.blocks).astype(np.int32)
    found = []
    for i in range(rounds):
        need = tables.size
        at = i * need % max(1, memory.blocks - need)
        tables[:] = free[at : at + need].reshape(tables.shape)
        slots = np.arange(sequences, dtype=np.int32)
        lengths = np.full(sequences, tokens, dtype=np.int32)
        q = torch.randn(sequences, HEADS, DIM).to(memory.dtype)
        k, out = torch.randn(sequences, KV_HEADS, DIM).to(memory.dtype), torch.empty_like(q)
        stages = (c.Stage * (LAYERS if together else 1))()
        keep: list[object] = []
        for stage, table in zip(stages, tables, strict=False):
            append, decode = c.Append(), c.Decode()
            keep += fill_append(append, memory, k, k, table, slots, lengths - 1)
            keep += fill_decode(decode, memory, q, out, table, slots, lengths)
            stage.size, stage.layer_stride = ctypes.sizeof(stage), sequences * blocks
            stage.append, stage.decode = ctypes.pointer(append), ctypes.pointer(decode)
        handover = c.Handover(stages=stages, n_stages=len(stages), layers=LAYERS // len(stages))
        job = c.Job(handover=ctypes.pointer(handover))
        ticket = worker.submit(job)
        while busy and worker.finished < ticket:
            pass
        worker.wait(ticket)
        found.append((job.end_ns - job.start_ns) * 1e-9)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cores = usable_cores()
    parser.add_argument("--threads", type=int, nargs="+", default=[cores // 2, cores - 4, cores - 1])
    parser.add_argument("--gigabytes", type=float, default=16.0)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--busy", action="store_true", help="one core more is busy, as an engine keeps it")
    args = parser.parse_args()
    block = 2 * KV_HEADS * DIM * BLOCK * 2
    memory = KVMemory.allocate(int(args.gigabytes * 2**30 / block), KV_HEADS, DIM, BLOCK, torch.bfloat16)
    memory.tensor.fill_(0.01)
    shapes = [(1, 1000), (2, 1000), (4, 1000), (8, 1000), (16, 1000), (4, 4000), (1, 16000)]
    print("sequences x tokens, a layer: " + "  ".join(f"{n} x {t}" for n, t in shapes))
    for threads, together in [(n, t) for n in args.threads for t in (False, True)]:
        read = read_bandwidth(threads) or float("nan")
        how = "together" if together else "in turn "
        line = [f"{threads:2} threads, reading {read / 1e9:5.1f} GB/s, {how}:"]
        with Pool(threads, None, spin_us=200) as pool, Worker(pool, spin_us=200) as worker:
            for shape in shapes:
                sequences, tokens = shape
                found = measure(memory, worker, *shape, args.rounds, args.busy, together)
                seconds = statistics.median(found[2:])
                read_bytes = 2 * KV_HEADS * DIM * 2 * tokens * sequences * LAYERS
                line.append(f"{seconds / LAYERS * 1e6:6.0f} us {read_bytes / seconds / 1e9:4.0f} GB/s")
        print("  ".join(line), flush=True)


if __name__ == "__main__":
    main()
