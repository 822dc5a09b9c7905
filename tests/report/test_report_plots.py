from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from report_builders import add_row, make_request, meta, pipelined_slices, synthetic_run

from neo.core.errors import InputError
from neo.core.record import RunRecord, Slice
from neo.report.files import run_result
from neo.report.metrics import SLO
from neo.report.plots import plot_comparison, plot_run
from neo.report.timeline import TRACK_NAMES, plot_timeline, write_timeline

needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None,
    reason="matplotlib is not installed",
)


def texts(path: Path) -> str:
    """SVG draws letters as paths, and keeps each text as a comment."""
    return path.read_text("utf-8")


@needs_matplotlib
def test_run_plots_are_written_and_reproducible(tmp_path: Path) -> None:
    record = synthetic_run(60)
    written = plot_run(record, meta(), tmp_path / "a")
    names = ["latency", "kv", "batch", "utilization"]
    assert [p.name for p in written] == [f"{n}.{s}" for n in names for s in ("svg", "png")]
    again = plot_run(synthetic_run(60), meta(), tmp_path / "b")
    for one, other in zip(written, again, strict=True):
        assert one.stat().st_size > 5000
        assert one.read_bytes() == other.read_bytes()
    assert "llama-3.1-8b on g5.16xlarge" in texts(written[0])
    assert "9,600 tokens" in texts(written[2])
    assert "<dc:date>" not in texts(written[0])


@needs_matplotlib
def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    plot_run(synthetic_run(5), meta(), tmp_path)
    assert dict(mpl.rcParams) == before
    code = (
        "import sys\n"
        "from neo.report.style import drawing, new_figure\n"
        "with drawing(): new_figure(4, 3, 'a', 'b').draw_without_rendering()\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@needs_matplotlib
def test_runs_with_little_in_them_are_drawn(tmp_path: Path) -> None:
    plot_run(RunRecord(), meta(), tmp_path)
    one = RunRecord(requests=[make_request(0, tokens=1)], start_s=0.0, end_s=0.5)
    add_row(one, 0.0, 0.5, steps=5, prefill_tokens=3, busy_gpu=0.5)
    plot_run(one, meta(layers=None), tmp_path)
    plot_comparison([run_result(RunRecord(), meta()), run_result(one, meta())], tmp_path)


@needs_matplotlib
def test_comparison_plot(tmp_path: Path) -> None:
    slo = SLO(ttft_s=2)
    results = [
        run_result(synthetic_run(80, offload=False), meta("gpu-only"), slo),
        run_result(synthetic_run(80), meta("neo"), slo),
    ]
    svg, png = plot_comparison(results, tmp_path)
    assert (svg.name, png.name) == ("comparison.svg", "comparison.png")
    assert "gpu-only vs neo" in texts(svg)
    assert "Goodput" in texts(svg)


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'neo-serve\[plots\]'"):
        plot_run(synthetic_run(5), meta(), tmp_path)


def events_of(path: Path) -> list[dict]:
    return json.loads(path.read_text("utf-8"))["traceEvents"]


def test_timeline_is_a_valid_trace(tmp_path: Path) -> None:
    slices = pipelined_slices(steps=3)
    events = events_of(write_timeline(slices, tmp_path / "t.json"))
    operations = [e for e in events if e["ph"] == "X" and e["cat"] != "STEP"]
    assert len(operations) == len(slices)
    for event in events:
        assert {"name", "ph", "pid", "tid"} <= set(event)
        assert event["ph"] in "XM"
    for event, s in zip(operations, slices, strict=True):
        assert event["ts"] == pytest.approx(s.start_s * 1e6, abs=1e-3)
        assert event["dur"] == pytest.approx((s.end_s - s.start_s) * 1e6, abs=2e-3)
        assert event["args"] == {"op": s.name, "layer": s.layer, "sub_batch": s.batch, "step": s.step}
    assert {"POST L2 b0", "CPU_ATTN L3 b1", "HEAD b0"} <= {e["name"] for e in operations}
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    order = {e["tid"]: e["args"]["sort_index"] for e in events if e["name"] == "thread_sort_index"}
    assert [tracks[t] for t in sorted(tracks, key=order.__getitem__)] == [
        TRACK_NAMES[r] for r in ("steps", "host", "gpu", "cpu", "h2d", "d2h")
    ]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["neo"]
    for track in tracks:
        times = sorted((e["ts"], e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == track)
        for (start, length), (following, _) in pairwise(times):
            assert round(start * 1000) + round(length * 1000) <= round(following * 1000)


def test_what_belongs_to_no_sub_batch_is_named_without(tmp_path: Path) -> None:
    slices = [
        Slice(0, "host", "SCHEDULE", None, -1, 0.0, 1.0),
        Slice(0, "h2d", "SWAP_IN", 3, -1, 1.0, 2.0),
        Slice(0, "gpu", "PRE", 3, 0, 1.0, 2.0),
    ]
    events = [e for e in events_of(write_timeline(slices, tmp_path / "t.json")) if e["ph"] == "X"]
    assert [e["name"] for e in events] == ["SCHEDULE", "SWAP_IN L3", "PRE L3 b0", "step 0"]
    assert [e["args"].get("sub_batch") for e in events] == [None, None, 0, None]


@needs_matplotlib
def test_the_picture_of_one_sub_batch_speaks_of_no_second(tmp_path: Path) -> None:
    slices = [Slice(0, "host", "SCHEDULE", None, -1, 0.0, 1.0), Slice(0, "gpu", "PRE", 3, 0, 1.0, 2.0)]
    svg, _ = plot_timeline(slices, tmp_path / "step.svg")
    assert "sub-batch" not in texts(svg)


def test_timeline_has_one_slice_per_step(tmp_path: Path) -> None:
    slices = pipelined_slices(steps=2)
    early = slices[-1].start_s - 1e-4  # step 2 is planned while step 1 runs
    slices.append(Slice(2, "host", "SCHEDULE", None, 0, early, early + 2e-4))
    events = events_of(write_timeline(slices, tmp_path / "t.json"))
    steps = [e for e in events if e.get("cat") == "STEP"]
    assert [(e["name"], e["args"]) for e in steps] == [(f"step {i}", {"step": i}) for i in range(3)]
    assert steps[1]["ts"] + steps[1]["dur"] == pytest.approx(steps[2]["ts"])


def test_timeline_of_nothing_and_of_nonsense(tmp_path: Path) -> None:
    assert [e["ph"] for e in events_of(write_timeline([], tmp_path / "t.json"))] == ["M"] * 3
    for bad in (Slice(0, "tpu", "PRE", 0, 0, 0.0, 1.0), Slice(0, "gpu", "PRE", 0, 0, 1.0, 0.5)):
        with pytest.raises(InputError, match="timeline: step 0, PRE"):
            write_timeline([bad], tmp_path / "bad.json")
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


@needs_matplotlib
def test_timeline_picture(tmp_path: Path) -> None:
    svg, png = plot_timeline(pipelined_slices(2), tmp_path / "step.svg", step=1, layers=(1, 2))
    assert (svg.name, png.name) == ("step.svg", "step.png")
    for part in ("CPU_ATTN 2", "sub-batch 1", "layers 1 to 2"):
        assert part in texts(svg)
    assert "SCHEDULE" not in texts(svg)
    with pytest.raises(InputError, match="nothing to show of step 9"):
        plot_timeline(pipelined_slices(2), tmp_path / "x.svg", step=9)
    with pytest.raises(InputError, match="nothing to show"):
        plot_timeline([], tmp_path / "x.svg")
