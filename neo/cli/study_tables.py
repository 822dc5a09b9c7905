"""What a study's results become: CSV files, the terminal's table, curves for the plots."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neo.cli.study import LATENCY, Point
from neo.cli.study_point import COUNTS, METRICS, QUANTILES
from neo.cli.study_run import Row, StudyResult
from neo.report.compare_plots import Curve, Panel, axis_numbers
from neo.report.files import atomic
from neo.report.published import Agreement, Series, crossing, read_published, x_label
from neo.report.tables import NOTHING, digits, format_change, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

Place = tuple[tuple[str, str], ...]
SUSTAINED = "sustained rate"


@dataclass(frozen=True, slots=True)
class Results:
    """A StudyResult with its figures by system and coordinates, and what was published of it."""

    result: StudyResult
    by: dict[tuple[str, Place], Row]
    published: tuple[Series, ...]

    @classmethod
    def of(cls, result: StudyResult) -> Results:
        """Index a study's rows, and read the published points that it names."""
        study = result.study
        series: tuple[Series, ...] = ()
        if study.published_path is not None and study.file.published is not None:
            series = read_published(study.published_path, study.file.published.figure)
        return cls(result, {(p.system, p.at): row for p, row in result.rows}, series)

    # -- figures ------------------------------------------------------------------------------------------

    @property
    def x(self) -> str | None:
        """The axis along which curves run: the first of numbers, else the first."""
        axes = [(name, labels) for name, labels in self.result.study.axes if len(labels) > 1]
        numeric = [name for name, labels in axes if axis_numbers(labels) is not None]
        names = numeric or [name for name, _ in axes] or [name for name, _ in self.result.study.axes]
        return names[0] if names else None

    def gain(self, system: str, at: Place) -> float | None:
        """The study's gain metric over the first system's, at the same coordinates."""
        name, first = self.result.study.file.gain, self.result.study.systems[0]
        own, base = self.by.get((system, at), {}).get(name), self.by.get((first, at), {}).get(name)
        return own / base if own is not None and base else None

    def places(self) -> list[tuple[str, Place]]:
        """(title, coordinates) of each panel: the combinations of all axes but the x axis."""
        axes = [(n, labels) for n, labels in self.result.study.axes if n != self.x]
        found = []
        for combination in product(*(labels for _, labels in axes)):
            place = tuple(zip((n for n, _ in axes), combination, strict=True))
            title = ", ".join(
                label for (_, labels), label in zip(axes, combination, strict=True) if labels[1:]
            )
            found.append((title, place))
        return found

    def panels(self, gain: bool = False) -> list[Panel]:
        """Curves of the study's metric, or of its gain, with the published points."""
        study, x = self.result.study, self.x
        labels = dict(study.axes).get(x, ()) if x is not None else ()
        panels = []
        for title, place in self.places():
            curves = []
            for system in study.systems[1:] if gain and len(study.systems) > 1 else study.systems:
                ats = [self._at(place, label) for label in labels] or [place]
                values = tuple(
                    self.gain(system, at) if gain else self.by.get((system, at), {}).get(study.file.metric)
                    for at in ats
                )
                told = self._told(system, gain) if len(self.places()) == 1 else ()
                curves.append(Curve(system, tuple(labels) or ("",), values, told))
            panels.append(Panel(title, tuple(curves)))
        return panels

    def _at(self, place: Place, label: str) -> Place:
        """Coordinates of a panel with a label of the x axis, in the study's order of axes."""
        known = dict(place)
        if self.x is not None:
            known[self.x] = label
        return tuple((name, known[name]) for name, _ in self.result.study.axes)

    def _told(self, system: str, gain: bool) -> tuple[tuple[str, float], ...]:
        kind = "gain" if gain else "metric"
        found = [s for s in self.published if s.system == system and s.kind == kind]
        return tuple((x_label(x), y) for s in found for x, y in s.points)

    def agreement(self) -> list[Agreement]:
        """Every published point beside its prediction, then the sustained rates."""
        file = self.result.study.file
        rows = []
        place = self.places()[0][1]
        for series in self.published:
            gain = series.kind == "gain"
            for x, value in series.points if series.kind != "sustained" else ():
                at = self._at(place, x_label(x)) if self.x is not None else place
                row = self.by.get((series.system, at), {})
                predicted = self.gain(series.system, at) if gain else row.get(file.metric)
                what = f"gain in {file.gain}" if gain else file.metric
                rows.append(Agreement(what, series.system, x_label(x), value, predicted, gain))
        if file.sustained is not None and self.result.sustained:
            rows += self._sustained_rates(file.sustained.limit)
        return rows

    def _sustained_rates(self, limit: float) -> Iterator[Agreement]:
        """What the paper says of it, else what its curve does."""
        said = {s.system: s for s in self.published if s.kind == "sustained" and s.at(f"{limit:g}")}
        for series in self.published:
            if series.kind != "metric":
                continue
            numbers = [(float(x), y) for x, y in series.points if not isinstance(x, str)]
            rate, beyond = crossing(numbers, limit)
            if series.system in said:
                rate, beyond = said[series.system].at(f"{limit:g}") or rate, False
            predicted = self.result.sustained.get((series.system, ()))
            yield Agreement(SUSTAINED, series.system, f"{limit:g}", rate, predicted, False, beyond)


# -- files ------------------------------------------------------------------------------------------------


def write_tables(results: Results, out: Path) -> None:
    """``results.csv`` (a row a point), ``sustained.csv`` and ``published.csv`` where there is something."""
    study = results.result.study
    axes = [name for name, _ in study.axes]
    rate = ["rate"] if results.result.searched and "rate" not in axes else []
    columns = [*axes, *rate]
    waits = bubble_columns(results)
    header = ("system", "policy", *columns, "searched", "gain", *COUNTS, *METRICS, *waits)
    rows = [_csv_row(results, p, row, columns, "no", waits) for p, row in results.result.rows]
    rows += [_csv_row(results, p, row, columns, "yes", waits) for p, row in results.result.searched]
    _write(out / "results.csv", header, rows)
    if results.result.sustained:
        rates = results.result.sustained
        names = [n for n in axes if n != "rate"]
        first = study.systems[0]
        _write(
            out / "sustained.csv",
            ("system", *names, "limit", "metric", "rate", "gain"),
            [
                (
                    system,
                    *(label for _, label in at),
                    *_limit(results),
                    rate,
                    _ratio(rate, rates[first, at]),
                )
                for (system, at), rate in rates.items()
            ],
        )
    agreement = results.agreement()
    if agreement:
        _write(
            out / "published.csv",
            ("what", "system", "x", "published", "predicted", "error", "extrapolated"),
            [(a.what, a.system, a.x, a.published, a.predicted, a.error, a.extrapolated) for a in agreement],
        )


def _limit(results: Results) -> tuple[float, str]:
    wanted = results.result.study.file.sustained
    assert wanted is not None
    return wanted.limit, wanted.metric


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if base and value is not None else None


def _csv_row(
    results: Results,
    point: Point,
    row: Row,
    columns: Sequence[str],
    searched: str,
    waits: Mapping[str, tuple[str, str]],
) -> tuple[Any, ...]:
    at = dict(point.at)
    policy = point.settings.policy.rpartition("/")[2]
    figures = [row.get(name) for name in (*COUNTS, *METRICS)]
    bubbles = row.get("bubbles", {})
    figures += [bubbles.get(resource, {}).get(cause) for resource, cause in waits.values()]
    gain = results.gain(point.system, point.at)
    return (point.system, policy, *(at.get(c) for c in columns), searched, gain, *figures)


def bubble_columns(results: Results) -> dict[str, tuple[str, str]]:
    """``bubbles_gpu_cpu_attention_s`` -> (resource, cause) of the report's figures; empty without reports."""
    rows = [row for _, row in (*results.result.rows, *results.result.searched)]
    first: Mapping[str, Mapping[str, float]] = next((r["bubbles"] for r in rows if "bubbles" in r), {})
    return {f"bubbles_{r}_{cause}_s": (r, cause) for r, causes in first.items() for cause in causes}


def bubble_reports(results: Results) -> dict[str, Mapping[str, Mapping[str, float]]]:
    """The bubble report of each point of the grid that has one, by the point's name."""
    return {point.name: row["bubbles"] for point, row in results.result.rows if "bubbles" in row}


def _write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


# -- the terminal -----------------------------------------------------------------------------------------


def metric_text(name: str, value: float | None) -> str:
    """A metric's value for people."""
    if value is None:
        return NOTHING
    return format_seconds(value) if "_s_" in name or name.endswith("_s") else digits(value, 4)


def _rate_text(rate: float | None) -> str:
    return "no limit found" if rate is None else digits(rate, 4)


def metric_name(name: str) -> str:
    """What an axis says of a metric."""
    if name == LATENCY:
        return "mean latency per output token (s)"
    unit = " (tokens/s)" if "token_throughput" in name else " (1/s)" if "throughput" in name else ""
    seconds = "_s_" in name or name.endswith("_s")
    text = name.replace("_s_", " ").removesuffix("_s").replace("_", " ")
    return f"{text} (s)" if seconds else f"{text}{unit}"


def tables(results: Results) -> Iterator[Table]:
    """The study's metric by coordinates and system, sustained rates, and published points with errors."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    study = results.result.study
    axes = [name for name, _ in study.axes]
    others = study.systems[1:]
    if results.by:
        title = f"{study.file.title} · {metric_name(study.file.metric)}; gain: {metric_name(study.file.gain)}"
        table = Table(title=escape(title), title_justify="left", box=box.SIMPLE)
        for name in (*axes, *study.systems, *(f"gain {s}" for s in others)):
            table.add_column(escape(name), justify="left" if name in axes else "right")
        for at in dict.fromkeys(at for _, at in results.by):
            found = [results.by.get((system, at), {}).get(study.file.metric) for system in study.systems]
            gains = [results.gain(system, at) for system in others]
            cells = [*(label for _, label in at), *(metric_text(study.file.metric, v) for v in found)]
            cells += [NOTHING if g is None else f"{g:.3f}" for g in gains]
            table.add_row(*map(escape, cells))
        yield table
    rates = results.result.sustained
    if rates:
        limit, metric = _limit(results)
        title = f"Sustained rate (requests/s), {metric_name(metric)} within {limit:g}"
        table = Table(title=escape(title), title_justify="left", box=box.SIMPLE)
        for name in (*(a for a in axes if a != "rate"), *study.systems, *(f"gain {s}" for s in others)):
            table.add_column(escape(name), justify="left" if name in axes else "right")
        for at in dict.fromkeys(at for _, at in rates):
            base = rates[study.systems[0], at]
            cells = [*(label for _, label in at), *(_rate_text(rates[s, at]) for s in study.systems)]
            ratios = [_ratio(rates[s, at], base) for s in others]
            cells += [NOTHING if g is None else f"{g:.3f}" for g in ratios]
            table.add_row(*map(escape, cells))
        yield table
    agreement = results.agreement()
    if agreement:
        table = Table(
            "what", "system", "at", "published", "predicted", "error", title="Beside what was published",
            title_justify="left", box=box.SIMPLE,
        )  # fmt: skip
        for a in agreement:
            error = NOTHING if a.error is None else format_change(a.error)
            error = f"{100 * a.error:+.1f} pp" if a.gain and a.error is not None else error
            predicted = NOTHING if a.predicted is None else digits(a.predicted, 4)
            told = digits(a.published, 4) + (" (extrapolated)" if a.extrapolated else "")
            table.add_row(*map(escape, (a.what, a.system, a.x, told, predicted, error)))
        yield table
    if reports := bubble_reports(results):
        from neo.report.bubbles import bubble_table

        yield bubble_table(reports)


# -- plots ------------------------------------------------------------------------------------------------

PLOTS = ("curves", "gain", "distribution")
_MOST_IN_FULL = 6  # points whose bubbles are drawn for every resource; of more, the GPU's alone


def draw(results: Results, out: Path) -> list[Path]:
    """The plots that the study asks for, as SVG and PNG."""
    from neo.report.compare_plots import plot_curves, plot_distributions

    study = results.result.study
    file, x = study.file, (results.x or "").replace("_", " ")
    x = "request rate (requests/s)" if x == "rate" else x
    limit = file.sustained.limit if file.sustained and file.sustained.metric == file.metric else None
    paths: list[Path] = []
    if "curves" in file.plots and results.by:
        paths += plot_curves(
            results.panels(), out / "curves", title=file.title, subtitle=file.note, x=x,
            y=metric_name(file.metric), limit=limit, logarithmic=file.metric == LATENCY,
        )  # fmt: skip
    if "gain" in file.plots and len(study.systems) > 1 and results.by:
        paths += plot_curves(
            results.panels(gain=True), out / "gain", title=file.title, subtitle=file.note, x=x,
            y=f"{metric_name(file.gain).partition(' (')[0]} over {study.systems[0]}", reference=1.0,
        )  # fmt: skip
    if "distribution" in file.plots:
        lines = [
            (p.name, row["distribution"], QUANTILES) for p, row in results.result.rows if row["distribution"]
        ]
        paths += plot_distributions(lines, out / "distribution", title=file.title, subtitle=file.note)
    if reports := bubble_reports(results):
        from neo.report.bubbles import plot_bubbles

        if len(reports) > _MOST_IN_FULL:
            reports = {name: {"gpu": report["gpu"]} for name, report in reports.items()}
        paths += plot_bubbles(reports, out / "bubbles", subtitle=file.title)
    return paths
