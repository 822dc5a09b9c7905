"""Run a study: its points over the cores, what is done kept on disk, sustained rates by bisection."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neo.cli.study import Point, Study, Sustained
from neo.cli.study_point import check_metric, point_key, work
from neo.core.errors import InputError
from neo.report.files import atomic

STORE_FILE = "points.jsonl"
_LEAST_RATE = 1e-4  # requests/s, below which a search gives up
_FARTHEST = 256  # times the highest rate known: a search without an edge ends there
_POOL_FROM = 3  # points from which starting worker processes pays

Row = dict[str, Any]
Search = Generator[float, float | None, float | None]


@dataclass(slots=True)
class StudyResult:
    """The rows of a study.

    Attributes:
        rows: each point of the grid with its results, in the study's order.
        searched: points that only the search for sustained rates ran, by curve and rate.
        sustained: per curve (system and coordinates without the rate), the highest rate within the limit;
            None where no rate misses it, which happens with too few requests.
    """

    study: Study
    rows: list[tuple[Point, Row]] = field(default_factory=list)
    searched: list[tuple[Point, Row]] = field(default_factory=list)
    sustained: dict[tuple[str, tuple[tuple[str, str], ...]], float | None] = field(default_factory=dict)


class Store:
    """Results by key, one JSON line each, written as they come; ``None`` as a path keeps them in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: dict[str, Row] = {}
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            for line in text.splitlines():
                with suppress(ValueError, KeyError, TypeError):  # a line cut short is a point not done
                    record = json.loads(line)
                    self.rows[record["key"]] = record["row"]
            if text and not text.endswith("\n"):
                path.write_text("".join(self._line(k, r) for k, r in self.rows.items()), encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write into --out {path.parent}: {error.strerror or error}") from None

    @staticmethod
    def _line(key: str, row: Row) -> str:
        return json.dumps({"key": key, "row": row}, allow_nan=False) + "\n"

    def put(self, key: str, row: Row) -> None:
        """Keep a result, on disk before this returns."""
        self.rows[key] = row
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._line(key, row))

    def finish(self, keys: Iterable[str]) -> None:
        """Leave just these, in this order: the same file however often the study was interrupted."""
        if self.path is not None:
            with atomic(self.path) as temporary:
                kept = "".join(self._line(key, self.rows[key]) for key in dict.fromkeys(keys))
                temporary.write_text(kept, encoding="utf-8")


def run_study(
    study: Study,
    out: str | Path | None = None,
    jobs: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> StudyResult:
    """Simulate all points of a study, and search for the sustained rates if it asks for them.

    Args:
        out: folder in which results are kept as they come, and looked for at the start.
        jobs: worker processes; by default one a core. With 1, everything runs in this process.
        progress: told (points done, points known of, the last one's name).

    Raises:
        InputError: a point fails, with its name; what other points gave is kept.
        KeyboardInterrupt: passed on at once; what is done is kept.
    """
    check_metric(study.file.metric, "metric")
    check_metric(study.file.gain, "gain")
    store = Store(Path(out) / STORE_FILE if out is not None else None)
    result = StudyResult(study)
    searching = study.file.sustained is not None
    if searching:
        _check_rates(study)
    with Workers(
        store, jobs, len(study.points) + (4 * len(study.points) if searching else 0), progress
    ) as team:
        grid = [p for p in study.points if p.settings.rate is not None or not searching]
        team.run_all(grid)
        result.rows = [(p, store.rows[point_key(p.settings)]) for p in grid]
        if study.file.sustained is not None and searching:
            check_metric(study.file.sustained.metric, "sustained metric")
            _search_all(study, study.file.sustained, team, result)
    order = [p for p, _ in result.rows] + [p for p, _ in result.searched]
    store.finish(point_key(p.settings) for p in order)
    return result


def _check_rates(study: Study) -> None:
    """InputError if a rate is searched for where none can be set."""
    for point in study.points:
        if point.settings.arrivals == "all-at-once" or point.settings.speedup is not None:
            raise InputError(f"{study.where}: [sustained]: {point.name} has no rate to search for")


# -- worker processes ----------------------------------------------------------------------------------------


class Workers:
    """Runs points in worker processes, or here where that is quicker, and stores their results."""

    def __init__(
        self, store: Store, jobs: int | None, expected: int, progress: Callable[[int, int, str], None] | None
    ) -> None:
        self.store = store
        self.jobs = jobs or os.cpu_count() or 1
        self.progress = progress
        self.done = self.known = 0
        self._pooled = self.jobs > 1 and expected >= _POOL_FROM
        self._pool: ProcessPoolExecutor | None = None
        self._running: dict[Future[Any], tuple[str, list[Point]]] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool is None:
            return
        if kind is not None:  # do not wait for points that nobody will read
            self._pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
        self._pool.shutdown()

    def run_all(self, points: Iterable[Point]) -> None:
        """Run points until all have results."""
        for point in points:
            self.submit(point)
        while self._running:
            self.next_done()

    def submit(self, point: Point) -> bool:
        """Start a point; True if its result is there already."""
        key = point_key(point.settings)
        self.known += 1
        if key in self.store.rows:
            self._tell(point)
            return True
        for running, points in self._running.values():
            if running == key:
                points.append(point)
                return False
        future: Future[Any]
        if self._pooled:
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(self.jobs, context, initializer=_ignore_interrupts)
            future = self._pool.submit(work, point.settings)
        else:
            future = Future()
            future.set_result(work(point.settings))
        self._running[future] = (key, [point])
        if not self._pooled:
            self.next_done()
            return True
        return False

    def next_done(self) -> list[Point]:
        """Wait for the next results; the points that have them now."""
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        finished: list[Point] = []
        for future in done:
            key, points = self._running.pop(future)
            try:
                row, problem = future.result()
            except BrokenProcessPool:
                raise InputError(f"{points[0].name}: its process died (out of memory?)") from None
            if row is None:
                raise InputError(f"{points[0].name}: {problem}")
            self.store.put(key, row)
            for point in points:
                self._tell(point)
            finished += points
        return finished

    def _tell(self, point: Point) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, max(self.known, self.done), point.name)


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides


# -- sustained rates -----------------------------------------------------------------------------------------


def bisection(known: dict[float, float | None], wanted: Sustained) -> Search:
    """Asks for the metric at one rate after another; returns the highest rate found within the limit.

    The metric is taken to grow with the rate: below the lowest rate that misses the limit, the highest that
    keeps it is where the search starts; then the rate is doubled or halved until both are known, and the gap
    halved until it is within the tolerance. 0 where no rate keeps the limit, None where none misses it.
    """

    def kept(value: float | None) -> bool:
        return value is not None and value <= wanted.limit

    bad = min((r for r, v in known.items() if not kept(v)), default=math.inf)
    good = max((r for r, v in known.items() if kept(v) and r < bad), default=0.0)
    farthest = _FARTHEST * max([wanted.start, *known])
    while bad == math.inf:
        rate = 2 * good or wanted.start
        if rate > farthest:
            return None
        if kept((yield rate)):
            good = rate
        else:
            bad = rate
    while good == 0.0:
        rate = bad / 2
        if rate < _LEAST_RATE:
            return 0.0
        if kept((yield rate)):
            good = rate
        else:
            bad = rate
    while bad - good > wanted.tolerance * good:
        rate = float(f"{(good + bad) / 2:.5g}")
        if not good < rate < bad:
            break
        if kept((yield rate)):
            good = rate
        else:
            bad = rate
    return good


def _search_all(study: Study, wanted: Sustained, team: Workers, result: StudyResult) -> None:
    """One bisection per curve, all at the same time."""
    curves: dict[Any, Point] = {}
    known: dict[Any, dict[float, float | None]] = {}
    for point in study.points:
        curves.setdefault(point.without_rate(), point)
        known.setdefault(point.without_rate(), {})
    for point, row in result.rows:
        if point.settings.rate is not None:
            known[point.without_rate()][point.settings.rate] = row[wanted.metric]
    asked: dict[Any, Point] = {}
    ran: dict[Any, list[Point]] = {curve: [] for curve in curves}
    searches = {curve: bisection(dict(known[curve]), wanted) for curve in curves}

    def advance(curve: Any, value: float | None, first: bool = False) -> None:
        while True:
            try:
                rate = next(searches[curve]) if first else searches[curve].send(value)
            except StopIteration as stop:
                result.sustained[curve] = stop.value
                asked.pop(curve, None)
                return
            first = False
            asked[curve] = point = curves[curve].with_rate(rate)
            ran[curve].append(point)
            if not team.submit(point):
                return
            value = team.store.rows[point_key(point.settings)][wanted.metric]

    for curve in curves:
        advance(curve, None, first=True)
    while asked:
        for point in team.next_done():
            advance(point.without_rate(), team.store.rows[point_key(point.settings)][wanted.metric])
    result.sustained = {curve: result.sustained[curve] for curve in curves}
    for curve in curves:
        for point in sorted(ran[curve], key=lambda p: p.settings.rate or 0.0):
            result.searched.append((point, team.store.rows[point_key(point.settings)]))


# -- progress ------------------------------------------------------------------------------------------------


def progress_bar(stack: ExitStack, title: str) -> Callable[[int, int, str], None] | None:
    """A rich progress bar over points; None where nobody watches."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[last]}"),
        console=Console(stderr=True),
        transient=True,
        refresh_per_second=5,
    )
    stack.enter_context(bar)
    task = bar.add_task(escape(title), total=None, last="")
    return lambda done, known, last: bar.update(task, completed=done, total=known, last=escape(last))
