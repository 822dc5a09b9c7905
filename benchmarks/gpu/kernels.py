"""Measures the CUDA kernels on this GPU: decode attention, small kernels, copies between tiers, hand-over.

usage: kernels.py [--out FILE.json] | --once

Every kernel is captured in a CUDA graph and replayed; times are medians of replays by CUDA events. ``--once``
runs each kernel a few times on small inputs instead, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neo.runtime import cpu_kernels, cpu_library
from neo.runtime import cuda_kernels as ck
from neo.runtime import cuda_library as c
from neo.runtime import cuda_transfers as ct
from neo.runtime.cpu_worker import Worker

GB = 1e9


def graph_of(work: Callable[[], None], times: int) -> torch.cuda.CUDAGraph:
    """`times` runs of `work` in one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            work()
    return graph


def seconds_of(work: Callable[[], None], times: int = 8, replays: int = 9, captured: bool = True) -> float:
    """Median seconds of one run of `work`, from replays of a graph of several or of several runs."""
    run = graph_of(work, times).replay if captured else lambda: [work() for _ in range(times)]
    torch.cuda.synchronize()
    found = []
    with torch.cuda.stream(torch.cuda.Stream()):
        run()
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) / 1e3 / times)
    return statistics.median(found)


def bandwidth() -> dict[str, float]:
    """Bytes per second of device memory: copied (read and written) and only read."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds_of(lambda: target.copy_(source), times=3)
    read = source.nbytes / seconds_of(lambda: source.sum(), times=3)
    return {"copy": copied, "read": read}


@dataclass(frozen=True)
class Shape:
    name: str
    lengths: tuple[int, ...]
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    block: int = 16


def mixed(total: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths from 1 to 32k, log-uniform, up to so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(int(2 ** (15 * float(torch.rand(1, generator=generator)))))
    return tuple(lengths)


SHAPES = (
    Shape("64 x 4k", (4096,) * 64),
    Shape("8 x 32k", (32768,) * 8),
    Shape("256 x 512", (512,) * 256),
    Shape("mixed 1..32k", mixed(262144)),
    Shape("64 x 1k", (1024,) * 64),
    Shape("1 x 128k", (131072,)),
    Shape("16 x 512", (512,) * 16),
    Shape("64 x 1k, 32/32 heads", (1024,) * 64, kv_heads=32),
    Shape("64 x 4k, block 8", (4096,) * 64, block=8),
    Shape("64 x 4k, block 32", (4096,) * 64, block=32),
    Shape("64 x 4k, head 64", (4096,) * 64, dim=64),
    Shape("64 x 4k, 64/4 heads", (4096,) * 64, heads=64, kv_heads=4),
)


def attention(shape: Shape, ctas: int = 0, stages: int = 0) -> tuple[ck.Attention, int]:
    """Launches over random block tables, and the bytes of KV that they read."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    counts = [-(-n // shape.block) for n in shape.lengths]
    plane = shape.dim * shape.block
    blocks = torch.empty(sum(counts), shape.kv_heads, 2, plane, dtype=shape.dtype, device="cuda")
    blocks.normal_(generator=generator)
    order = torch.randperm(sum(counts), generator=generator, device="cuda").to(torch.int32)
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int32, device="cuda")
    for row, part in enumerate(order.split(counts)):
        tables[row, : len(part)] = part
    lengths = torch.tensor(shape.lengths, dtype=torch.int32, device="cuda")
    q = torch.randn(len(counts), shape.heads, shape.dim, device="cuda", generator=generator).to(shape.dtype)
    cache = ck.cache_of(blocks, shape.block)
    size = ck.decode_workspace(cache, len(counts), shape.heads, ctas, stages)
    workspace = torch.empty(size, dtype=torch.uint8, device="cuda")
    launch = ck.decode(cache, q, torch.empty_like(q), tables, lengths, workspace, ctas=ctas, stages=stages)
    launch.plan()
    return launch, sum(shape.lengths) * shape.kv_heads * shape.dim * 2 * blocks.element_size()


def attentions(ceiling: float, sweep: bool) -> list[dict[str, Any]]:
    found = []
    multiprocessors = c.describe().multiprocessors
    for i, shape in enumerate(SHAPES):
        layouts = [(0, 0)]
        if sweep and i < 3:
            layouts += [
                (multiprocessors * per, s)
                for per, s in ((1, 3), (1, 4), (1, 6), (2, 2), (2, 3), (3, 2), (4, 1))
            ]
        for ctas, stages in layouts:
            launch, size = attention(shape, ctas, stages)
            took = seconds_of(launch.attend)
            plan = seconds_of(launch.plan)
            rate = size / took
            found.append(
                {
                    "shape": shape.name,
                    "ctas": ctas,
                    "stages": stages,
                    "us": took * 1e6,
                    "plan_us": plan * 1e6,
                    "bytes": size,
                    "bytes_per_s": rate,
                    "of_measured": rate / ceiling,
                }
            )
            label = f"{shape.name}{f', {ctas} ctas x {stages} stages' if ctas else ''}"
            print(
                f"  {label:40s} {took * 1e6:8.1f} us {rate / GB:7.0f} GB/s {rate / ceiling:6.1%}"
                f"  plan {plan * 1e6:.1f} us"
            )
    return found


def small_kernels() -> list[dict[str, Any]]:
    found = []
    hidden, heads, kv_heads, dim, inner = 4096, 32, 8, 128, 14336
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    for rows in (64, 8192):
        x, y, out = (torch.randn(rows, hidden, **kind) for _ in range(3))
        fused = torch.randn(rows, (heads + 2 * kv_heads) * dim, **kind)
        cos, sin = (torch.randn(rows, dim, **kind) for _ in range(2))
        q, k, v = (torch.empty(rows, n, dim, **kind) for n in (heads, kv_heads, kv_heads))
        blocks = torch.empty(rows // 16 + 1, kv_heads, 2, dim * 16, **kind)
        tables = torch.arange(len(blocks), dtype=torch.int32, device="cuda")[None]
        slots = torch.zeros(rows, dtype=torch.int32, device="cuda")
        positions = torch.arange(rows, dtype=torch.int32, device="cuda")
        both, act = torch.randn(rows, 2 * inner, **kind), torch.empty(rows, inner, **kind)
        cache = ck.cache_of(blocks, 16)
        parts = fused.view(rows, -1, dim).split([heads, kv_heads, kv_heads], 1)
        shifted = positions.roll(-3)  # no tile of rows begins with a block
        rotary: list[tuple[str, Sequence[Tensor], Tensor]] = [
            ("rotary + append", (q, k, v), positions),
            ("in place", parts, positions),
            ("in place, shifted", parts, shifted),
        ]
        launches: dict[str, tuple[ck.Launch, int]] = {
            "add + RMSNorm": (ck.add_rms_norm(x, y, x[0].clone(), out, 1e-5), 4 * x.nbytes),
            "SiLU * up": (ck.silu_mul(both, act), both.nbytes + act.nbytes),
        }
        for name, to, at in rotary:
            launch = ck.qkv_rope_append(
                cache, fused, ck.QkvWeights(), cos, sin, *to, tables, slots, at
            )  # fmt: skip
            written = fused.nbytes - (0 if to[2] is v else v.nbytes)  # v stays where it is
            launches[name] = launch, fused.nbytes + written + 2 * k.nbytes
        for name, (launch, size) in launches.items():
            took = seconds_of(launch)
            found.append({"kernel": name, "rows": rows, "us": took * 1e6, "bytes_per_s": size / took})
            print(f"  {name:20s} {rows:5d} rows {took * 1e6:8.1f} us {size / took / GB:7.0f} GB/s")
    return found


def copies(blocks: int = 4096, elements: int = 32768) -> list[dict[str, Any]]:
    """Layer-blocks of 64 KiB (8 heads of 128 in 16 bits, 16 tokens) in random order."""
    device = torch.randn(blocks, elements, device="cuda").half()
    pinned = torch.empty(blocks, elements, dtype=torch.float16, pin_memory=True)
    pinned.copy_(device)
    count = blocks // 2
    orders = [torch.randperm(blocks, dtype=torch.int64)[:count].to(torch.int32) for _ in range(2)]
    ordered = torch.arange(count, dtype=torch.int32)
    on_device = [o.cuda() for o in orders]
    size = count * elements * 2
    ways: dict[str, dict[str, Any]] = {}
    for ctas in (2, 4, 8, 16, 32, 64):
        ways[f"kernel, {ctas} ctas"] = {"lists": on_device, "ctas": ctas}
    ways["engines, random"] = {"lists": orders, "engines": True}
    ways["engines, one run"] = {"lists": [ordered, ordered], "engines": True}
    found = []
    for name, way in ways.items():
        lists = way.pop("lists")
        out = ct.copy_blocks(device, pinned, *lists, **way)
        back = ct.copy_blocks(pinned, device, *lists, **way)
        side = torch.cuda.Stream()

        def both(out: ck.Launch = out, back: ck.Launch = back, side: torch.cuda.Stream = side) -> None:
            side.wait_stream(torch.cuda.current_stream())
            back(side.cuda_stream)
            out()
            torch.cuda.current_stream().wait_stream(side)

        captured = "engines" not in way
        rates = [size / seconds_of(w, 1, 5, captured) for w in (out, back)]
        together = 2 * size / seconds_of(both, 1, 5, captured)
        found.append({"way": name, "to_host": rates[0], "to_device": rates[1], "both": together})
        print(
            f"  {name:20s} to host {rates[0] / GB:5.1f}  to device {rates[1] / GB:5.1f}"
            f"  both {together / GB:5.1f} GB/s"
        )
    return found


def handovers(layers: int = 32) -> list[dict[str, Any]]:
    """Round trips of a captured graph with a thread of the CPU library that answers at once."""
    found = []
    heads, kv_heads, dim = 32, 8, 128
    with cpu_kernels.Pool(1) as pool, Worker(pool, spin_us=-1) as worker:
        for rows in (0, 1, 4, 16, 64, 256):
            kind = {"dtype": torch.bfloat16, "device": "cuda"}
            q, k, v = (torch.randn(rows, n, dim, **kind) for n in (heads, kv_heads, kv_heads))
            shape = (max(rows, 1), (heads + 2 * kv_heads) * dim)
            packed = torch.zeros(shape, dtype=torch.bfloat16, pin_memory=True)
            answers = torch.zeros(max(rows, 1), heads * dim, dtype=torch.bfloat16, pin_memory=True)
            out = torch.empty(rows, heads * dim, **kind)
            channel = ct.Channel()
            post = ct.post_rows(channel, q, k, v, packed)
            wait = ct.await_rows(channel, answers, out, timeout_s=5)
            ctypes.c_uint32.from_address(channel.answer).value = 1
            post()  # once outside of a graph, for the driver to load the kernels
            wait()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(layers):
                    post()
                    wait()
            times = []
            for _ in range(11):
                torch.cuda.synchronize()
                stage = cpu_library.Stage(
                    request=channel.request, answer=channel.answer, first=channel.requested + 1
                )
                served = cpu_library.Handover(stages=ctypes.pointer(stage), n_stages=1, layers=layers)
                job = cpu_library.Job(handover=ctypes.pointer(served))
                ticket = worker.submit(job)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                worker.wait(ticket, 10)
                times.append(start.elapsed_time(end) / 1e3 / layers)
            assert not channel.failed
            took = statistics.median(times[1:])
            found.append(
                {"rows": rows, "bytes": rows * (heads * 2 + kv_heads * 2) * dim * 2, "us": took * 1e6}
            )
            print(f"  {rows:4d} rows there and back {took * 1e6:7.1f} us")
    return found


def once() -> None:
    """Every kernel on small inputs, results looked at only by compute-sanitizer."""
    shapes = [
        Shape("odd", (1, 17, 300, 5)),
        Shape("one head", (40, 3), 4, 4, 64, torch.float16, 8),
        Shape("wide", (129,), 16, 1, 128, torch.float16, 32),
        Shape("plain", (70, 3), 4, 2, 64, torch.float32),
    ]
    for shape in shapes:
        launch, _ = attention(shape, ctas=4)
        launch.attend()
        launch.attend()
        torch.cuda.synchronize()
    x, w = torch.randn(3, 4096, device="cuda").half(), torch.ones(4096, device="cuda").half()
    ck.add_rms_norm(x, x.clone(), w, torch.empty_like(x), 1e-5)()
    ck.silu_mul(x, torch.empty(3, 2048, device="cuda").half())()
    host = torch.zeros(4, 4096, dtype=torch.float16, pin_memory=True)
    order = torch.tensor([2, 0, 1], dtype=torch.int32, device="cuda")
    ct.copy_blocks(x, host, order, order)()
    for rows in (3, 540):  # a warp a head; 16 rows a block
        fused, angle = torch.randn(rows, 8 * 128, device="cuda").half(), torch.randn(rows, 128, device="cuda")
        parts = fused.view(rows, 8, 128).split([4, 2, 2], 1)
        cache = ck.cache_of(torch.zeros(40, 2, 2, 128 * 16, device="cuda").half(), 16)
        tables, slots = (torch.arange(40, device="cuda"), torch.zeros(rows, device="cuda"))
        places = tables.int()[None], slots.int(), torch.arange(5, 5 + rows, device="cuda").int()
        angles = angle.half(), angle.half()
        ck.qkv_rope_append(cache, fused, ck.QkvWeights(), *angles, *parts, *places)()
    channel = ct.Channel()
    q = torch.randn(3, 4, 64, device="cuda").half()
    ct.post_rows(channel, q, q, q, host)()
    torch.cuda.synchronize()
    ctypes.c_uint32.from_address(channel.answer).value = 1
    ct.await_rows(channel, host, x, timeout_s=20)()
    torch.cuda.synchronize()
    print("ran each kernel once")


def section(name: str, work: Callable[[], Any], results: dict[str, Any]) -> Any:
    """A failure of one is reported and leaves the others."""
    print(name)
    try:
        results[name] = work()
    except Exception as error:  # the script's purpose is to report whatever works
        results[name] = {"error": f"{type(error).__name__}: {error}"}
        print(f"  failed: {type(error).__name__}: {error}")
    torch.cuda.empty_cache()
    return results[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--no-sweep", action="store_true", help="attention in its own layout only")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.once:
        once()
        return
    info = c.describe()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "capability": info.capability,
        "driver": info.driver,
        "runtime": info.runtime,
        "torch": torch.__version__,
        "host": platform.processor() or platform.machine(),
    }
    print(results["device"], "torch", torch.__version__)
    measured = section("bandwidth", bandwidth, results)
    print("  " + ", ".join(f"{k} {v / GB:.0f} GB/s" for k, v in measured.items()))
    ceiling = max(measured.values())
    section("decode attention", lambda: attentions(ceiling, not args.no_sweep), results)
    section("small kernels", small_kernels, results)
    section("copies", copies, results)
    section("hand-over", handovers, results)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
