"""Prometheus metrics, made in the HTTP process from the engine's messages. Names: docs/metrics.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client import Counter as Total
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from neo import __version__
from neo.core.record import Mode
from neo.cost.calibrated import PARTS
from neo.runtime.server.bridge import Live, Observer
from neo.runtime.server.counted import CountedHistogram
from neo.runtime.server.messages import Ready, StepInfo, Update

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

# The bounds that vLLM uses for the metrics of the same names, so that dashboards for it fit.
_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_BETWEEN = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY = (0.05, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 480.0, 1920.0)
_ITERATION = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_STEP = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


def about_engine(ready: Ready) -> dict[str, str]:
    """What serves, in a few words: ``device``, ``executor``, ``policy``, ``cost_model``."""
    described = ready.description
    executor = described.get("executor", {})
    about = {
        "device": executor.get("device") or described.get("hardware", ""),
        "executor": executor.get("executor", ""),
        "policy": described.get("policy", ""),
        "cost_model": described.get("cost_model", ""),
    }
    return {name: str(value) for name, value in about.items()}


class Metrics(Observer):
    """All metrics of a server; its own registry, so that several servers fit into one process."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._running = self._gauge("num_requests_running", "Requests that hold KV or run.")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait to be scheduled.")
        usage = self._labelled(
            Gauge, "kv_cache_usage_perc", "Share of a tier's KV blocks in use, 0 to 1.", "tier"
        )
        self._usage = (usage("gpu"), usage("cpu"))
        self._preemptions = self._counter("num_preemptions", "Preemptions.")
        self._prompt = self._counter("prompt_tokens", "Prompt tokens of requests whose first token came.")
        self._generated = self._counter("generation_tokens", "Tokens generated.")
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _TTFT)
        self._itl = self._histogram("inter_token_latency_seconds", "Between two tokens.", _BETWEEN)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", _LATENCY)
        self._queue = self._histogram(
            "request_queue_time_seconds", "From arrival to being scheduled.", _LATENCY
        )
        self._iteration = self._histogram("iteration_tokens_total", "Tokens computed in a step.", _ITERATION)
        self._success = self._labelled(
            Total, "request_success", "Requests that ended, by reason.", "finished_reason"
        )
        self._ends = {r: self._success(r) for r in ("stop", "length", "abort")}
        steps = self._labelled(Total, "steps", "Steps by how they ran.", "mode")
        self._steps = {mode: steps(mode.name.lower().replace("_", "-")) for mode in Mode}
        decoded = self._labelled(Total, "decode_tokens", "Decode tokens by where attention was.", "tier")
        self._decoded = (decoded("gpu"), decoded("cpu"), decoded("streamed"))
        moved = self._labelled(Total, "bytes_moved", "KV and activations moved over the link.", "direction")
        self._moved = (moved("h2d"), moved("d2h"))
        self._measured = self._histogram("step_time_seconds", "Measured time of a step.", _STEP)
        self._predicted = self._histogram(
            "step_time_predicted_seconds", "Time of the same steps by the cost model.", _STEP
        )
        correction = self._labelled(
            Gauge,
            "cost_correction",
            "What the cost model's times are multiplied by; 1 without --cost calibrated:BASE.",
            "part",
        )
        self._corrections = {part: correction(part) for part in PARTS}
        for gauge in self._corrections.values():
            gauge.set(1.0)
        self._http = self._labelled(Total, "http_requests", "HTTP answers by status.", "status")
        self._statuses: dict[int, Total] = {}
        self._ready: Ready | None = None

    def _gauge(self, name: str, help: str) -> Gauge:
        return Gauge(f"neo:{name}", help, ["model_name"], registry=self.registry).labels(self._model)

    def _counter(self, name: str, help: str) -> Total:
        return Total(f"neo:{name}", help, ["model_name"], registry=self.registry).labels(self._model)

    def _histogram(self, name: str, help: str, bounds: tuple[float, ...]) -> CountedHistogram:
        found = CountedHistogram(f"neo:{name}", help, {"model_name": self._model}, bounds)
        self.registry.register(found)
        return found

    def _labelled(self, kind: type, name: str, help: str, label: str):  # type: ignore[no-untyped-def]
        """A metric with a further label; called with its value, it gives the child."""
        found = kind(f"neo:{name}", help, ["model_name", label], registry=self.registry)
        return lambda value: found.labels(self._model, value)

    def engine(self, ready: Ready) -> None:
        """The engine is there: what it is becomes labels."""
        self._ready = ready
        about = {"model_name": self._model, **about_engine(ready), "version": __version__}
        info = Gauge("neo:engine_info", "What serves; always 1.", [*about], registry=self.registry)
        info.labels(**about).set(1)

    def update(self, update: Update) -> None:
        """Gauges and the step of a message."""
        self._running.set(update.running)
        self._waiting.set(update.waiting)
        if self._ready is not None:
            for gauge, used, total in zip(self._usage, update.kv_used, self._ready.kv_total, strict=True):
                gauge.set(used / total if total else 0.0)
        if update.step is not None:
            self._step(update.step)

    def _step(self, step: StepInfo) -> None:
        steps = len(step.seconds)
        self._steps[Mode(step.mode)].inc(steps)
        for part, factor in (step.cost_factors or {}).items():
            self._corrections[part].set(factor)
        decodes = (step.gpu_decodes, step.cpu_decodes, step.stream_decodes)
        for seconds in step.seconds:
            self._measured.observe(seconds)
        self._iteration.observe(step.prefill_tokens + sum(decodes), steps)
        for seconds, count in step.predicted_s:
            self._predicted.observe(seconds, count)
        for counter, amount in (
            *zip(self._decoded, [steps * n for n in decodes], strict=True),
            *zip(self._moved, (step.bytes_h2d, step.bytes_d2h), strict=True),
            (self._preemptions, step.preemptions),
        ):
            if amount:
                counter.inc(amount)

    def tokens(self, lives: Sequence[Live], ends: Sequence[float]) -> None:
        """Tokens came."""
        self._generated.inc(len(lives) * len(ends))
        for last_s, count in Counter(live.last_s for live in lives if live.tokens).items():
            self._itl.observe(ends[0] - last_s, count)
        for before, end in pairwise(ends):
            self._itl.observe(end - before, len(lives))
        for live in lives:
            if not live.tokens:
                self._ttft.observe(ends[0] - live.arrival_s)
                self._prompt.inc(live.prompt_tokens)

    def queued(self, seconds: float) -> None:
        """A request was scheduled."""
        self._queue.observe(seconds)

    def ended(self, live: Live, reason: str, now: float) -> None:
        """A request ended."""
        counter = self._ends.get(reason)
        if counter is None:
            counter = self._ends[reason] = self._success(reason)
        counter.inc()
        if reason in ("stop", "length"):
            self._e2e.observe(now - live.arrival_s)

    def answered(self, status: int) -> None:
        """An HTTP answer was given."""
        counter = self._statuses.get(status)
        if counter is None:
            counter = self._statuses[status] = self._http(str(status))
        counter.inc()

    def page(self) -> bytes:
        """The text of ``/metrics``."""
        return generate_latest(self.registry)
