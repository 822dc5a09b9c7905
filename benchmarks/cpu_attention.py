"""CPU decode attention against this machine's read speed and against torch.

Every figure is GB/s of K and V bytes. `read` reads the same bytes with the same threads in the same order and
computes nothing (by the kernel's way to fetch ahead that is fastest in the median); `ratio` is the kernel's
speed over it. The cache is far larger than the processor's caches. All things compared take turns, round
after round, as a machine may change its speed from one to the next: `ratio` is taken round by round. Medians;
with --json also the least and the largest ratio.

    python benchmarks/cpu_attention.py --threads 2
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from neo.runtime import cpu_kernels as ck
from neo.runtime.cpu_kernels import KVType, PagedCache, Pool, Prefetch

HEAD_DIM = 128


@dataclass(frozen=True)
class Shape:
    name: str
    lengths: tuple[int, ...]
    heads: tuple[int, int] = (32, 8)
    dtype: str = "fp16"
    blocks: str = "random"


@dataclass
class Result:
    shape: str
    heads: str
    dtype: str
    blocks: str
    block_size: int
    read: float
    kernel: float
    ratio: float
    ratios: tuple[float, float]  # least and most
    torch: float | None


def mixed(total: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths between 1 and `longest`, evenly spread in their logarithm, until they add up to `total`."""
    rng = np.random.default_rng(seed)
    lengths: list[int] = [longest, 1]
    while sum(lengths) < total:
        lengths.append(int(np.exp(rng.uniform(0, np.log(longest)))))
    return tuple(int(x) for x in rng.permutation(lengths))


def shapes(quick: bool) -> Iterator[Shape]:
    equal = [("16x1k", 16, 1024), ("64x1k", 64, 1024), ("8x8k", 8, 8192), ("1x32k", 1, 32768)]
    for heads, (name, batch, length) in product([(32, 8), (32, 32)], equal):
        if not quick or name == "16x1k":
            yield Shape(name, (length,) * batch, heads)
    unequal = Shape("1..32k", mixed(131072, 32768))
    yield unequal
    if not quick:
        yield replace(unequal, name="8x16k", lengths=(16384,) * 8)
        yield replace(unequal, name="1..32k", heads=(32, 32), lengths=mixed(40000, 32768))
    for heads in [(32, 8), (32, 32)]:
        yield Shape("16x1k", (1024,) * 16, heads, blocks="contiguous")
        yield Shape("16x1k", (1024,) * 16, heads, dtype="bf16")


class Bench:
    """One shape: several sets of sequences, together `total_bytes` of cache, swept one after the other."""

    def __init__(self, shape: Shape, block_size: int, total_bytes: float, threads: int) -> None:
        self.shape, self.block_size, self.threads = shape, block_size, threads
        q_heads, kv_heads = shape.heads
        self.kv = KVType[shape.dtype.upper()]
        counts = [-(-length // block_size) for length in shape.lengths]
        one = sum(counts) * block_size * 2 * kv_heads * HEAD_DIM * self.kv.bytes
        self.sets = max(1, round(total_bytes / one))
        self.cache = PagedCache.allocate(self.sets * sum(counts), kv_heads, HEAD_DIM, block_size, self.kv)
        assert self.cache.memory is not None
        rng = np.random.default_rng(0)
        numbers = rng.standard_normal(1 << 20).astype(np.float32)
        some = numbers.astype(np.float16) if self.kv is KVType.FP16 else (numbers.view(np.uint32) >> 16)
        for at in range(0, self.cache.memory.size, some.size):
            part = self.cache.memory[at : at + some.size]
            part[:] = some[: part.size]
        order = np.arange(self.cache.num_blocks, dtype=np.int32)
        if shape.blocks == "random":
            rng.shuffle(order)
        self.tables = np.zeros((self.sets, len(counts), max(counts)), np.int32)
        at = 0
        for s, (i, count) in product(range(self.sets), enumerate(counts)):
            self.tables[s, i, :count] = order[at : at + count]
            at += count
        self.lengths = np.array(shape.lengths, np.int32)
        self.q = some[: len(counts) * q_heads * HEAD_DIM].reshape(-1, q_heads, HEAD_DIM).astype(self.kv.numpy)
        self.out = np.empty_like(self.q)
        self.bytes = self.sets * int(self.lengths.sum()) * 2 * kv_heads * HEAD_DIM * self.kv.bytes

    def attend(self, pool: Pool) -> None:
        for tables in self.tables:
            ck.decode_attention(pool, self.cache, self.q, self.out, tables, self.lengths)

    def read(self, pool: Pool) -> None:
        for tables in self.tables:
            ck.read_cache(pool, self.cache, self.q, tables, self.lengths)

    def torch(self) -> tuple[Callable[[], None], int] | None:
        """Torch's attention over contiguous K and V of equal lengths, and the bytes it reads.

        The query heads of a group stand on the query axis, which for one token is the same sum and two to ten
        times faster than `enable_gqa`. It sweeps a fifth of the cache: still far more than caches hold.
        """
        try:
            import torch
        except ImportError:
            return None
        if len(set(self.shape.lengths)) != 1:
            return None
        torch.set_num_threads(self.threads)
        (q_heads, kv_heads), batch = self.shape.heads, len(self.shape.lengths)
        kind = torch.float16 if self.kv is KVType.FP16 else torch.bfloat16
        assert self.cache.memory is not None
        flat = torch.from_numpy(self.cache.memory).view(kind)
        each = batch * kv_heads * self.shape.lengths[0] * HEAD_DIM
        rows = (batch, kv_heads, self.shape.lengths[0], HEAD_DIM)
        q = torch.from_numpy(self.q).view(kind).reshape(batch, kv_heads, q_heads // kv_heads, HEAD_DIM)
        sets = -(-self.sets // 5)

        def run() -> None:
            for s in range(sets):
                k, v = (flat[(2 * s + i) * each : (2 * s + i + 1) * each].view(rows) for i in (0, 1))
                torch.nn.functional.scaled_dot_product_attention(q, k, v)

        return run, 2 * each * self.kv.bytes * sets


def measure(shape: Shape, args: argparse.Namespace) -> Result:
    bench = Bench(shape, args.block_size, args.gigabytes * 1e9, args.threads)
    pools = {"kernel": Pool(args.threads, args.cores)}
    for prefetch, segment in product([Prefetch.STARTS, Prefetch.WHOLE], [32, 64]):
        pools[f"read {prefetch.name} {segment}"] = Pool(
            args.threads, args.cores, prefetch=prefetch, segment=segment
        )
    rival = None if args.no_torch else bench.torch()
    speeds: dict[str, list[float]] = {}

    def timed(name: str, run: Callable[[], None], read: int = bench.bytes) -> None:
        begin = time.perf_counter()
        run()
        speeds.setdefault(name, []).append(read / (time.perf_counter() - begin) / 1e9)

    for round_ in range(args.rounds):
        for name, pool in pools.items():
            work = bench.attend if name == "kernel" else bench.read
            with pool.step():
                timed(name, partial(work, pool))
        if rival is not None and round_ < 2:
            timed("torch", *rival)
    for pool in pools.values():
        pool.close()
    torch_speed = max(speeds.pop("torch")) if "torch" in speeds else None
    rounds = np.array(speeds.pop("kernel"))
    ways = np.array(list(speeds.values()))
    reads = ways[np.median(ways, axis=1).argmax()]  # not the best of every round, which would be its luck
    return Result(
        shape.name,
        f"{shape.heads[0]}/{shape.heads[1]}",
        shape.dtype,
        shape.blocks,
        args.block_size,
        float(np.median(reads)),
        float(np.median(rounds)),
        float(np.median(rounds / reads)),
        (float((rounds / reads).min()), float((rounds / reads).max())),
        torch_speed,
    )


def variants(args: argparse.Namespace) -> None:
    """Kernel and read speed by how the kernel fetches ahead: medians, all taking turns."""
    for heads in [(32, 8), (32, 32)]:
        bench = Bench(
            Shape("64x1k", (1024,) * 64, heads), args.block_size, args.gigabytes * 1e9, args.threads
        )
        speeds: dict[tuple[str, int], list[tuple[float, float]]] = {}
        pools = {
            (way.name, segment): Pool(args.threads, args.cores, prefetch=way, segment=segment)
            for way, segment in product([Prefetch.STARTS, Prefetch.WHOLE], [32, 64, 128])
        }
        for _, (key, pool) in product(range(args.rounds), pools.items()):
            seconds = []
            with pool.step():
                for run in (bench.attend, bench.read):
                    begin = time.perf_counter()
                    run(pool)
                    seconds.append(time.perf_counter() - begin)
            kernel, read = (bench.bytes / s / 1e9 for s in seconds)
            speeds.setdefault(key, []).append((kernel, read))
        for (way, segment), found in speeds.items():
            kernel, read = np.median(np.array(found), axis=0)
            name = f"{heads[0]}/{heads[1]}"
            print(f"{name:>6} {way:>7} {segment:4} tokens  kernel {kernel:6.1f}  read {read:6.1f}")
        for pool in pools.values():
            pool.close()


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    family = f"family {found.get('cpu family', '?')} model {found.get('model', '?')}"
    return f"{found.get('model name', 'unknown')} ({family})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cores", type=lambda s: [int(x) for x in s.split(",")], help="e.g. 0,1: one a thread"
    )
    parser.add_argument("--block-size", type=int, default=16, choices=[8, 16, 32])
    parser.add_argument("--gigabytes", type=float, default=2.2, help="size of the cache that is swept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a few shapes only")
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--variants", action="store_true", help="only: ways to fetch ahead, side by side")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    args = parser.parse_args()
    print(f"{processor()}, {args.threads} threads, {ck.target()}, blocks of {args.block_size} tokens")
    if args.variants:
        variants(args)
        return
    columns = {"heads": 6, "shape": 7, "kv": 5, "blocks": 11, "read": 6, "kernel": 7, "ratio": 6, "torch": 6}
    print(" ".join(f"{name:>{width}}" for name, width in columns.items()))
    results = []
    for shape in shapes(args.quick):
        r = measure(shape, args)
        results.append(asdict(r))
        rival = "-" if r.torch is None else f"{r.torch:.1f}"
        print(
            f"{r.heads:>6} {r.shape:>7} {r.dtype:>5} {r.blocks:>11} {r.read:6.1f} {r.kernel:7.1f} "
            f"{r.ratio:6.2f} {rival:>6}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"processor": processor(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
