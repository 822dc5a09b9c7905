"""``neo serve`` as a process of its own, as operators run it, and what tests ask it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

_LONG_S = 120.0  # for a machine that is busy; nothing here waits so long unless something hangs
MODEL = "neo-tiny"
DEVICE: Any = os.environ.get("NEO_TEST_DEVICE", "cpu")
"""What servers run on: cpu, or cuda to put the same tests to a GPU (as ``benchmarks/gpu/serve.sh`` does)."""
QUEUE = 1000  # requests that may wait in the server that tests share


class Served:
    """A running server: its address, its process, a client for it."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log
        self.http = httpx.Client(base_url=url, timeout=_LONG_S, verify=False)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def complete(self, **body: Any) -> dict[str, Any]:
        answer = self.post("/v1/completions", **body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def metrics(self) -> dict[str, float]:
        """Sample name with its labels (but the model's) to value."""
        found = {}
        for line in self.http.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                found[re.sub(r',?model_name="[^"]*",?', "", name).replace("{}", "")] = float(value)
        return found

    def wait_for(self, **wanted: float) -> None:
        """Until the gauges or counters ``neo:NAME`` have these values; fails if they never do."""
        until = time.monotonic() + _LONG_S
        while True:
            found = self.metrics()
            seen = {name: found[f"neo:{name}"] for name in wanted}
            if seen == wanted:
                return
            assert time.monotonic() < until, f"{seen}, wanted {wanted}"
            time.sleep(0.02)

    def wait_until_empty(self) -> None:
        """Until nothing runs or waits; KV memory must then be free again."""
        self.wait_for(num_requests_running=0, num_requests_waiting=0)
        found = self.metrics()
        assert found['neo:kv_cache_usage_perc{tier="gpu"}'] == 0
        assert found['neo:kv_cache_usage_perc{tier="cpu"}'] == 0

    def engine_pid(self) -> int:
        """The one child of the HTTP process."""
        (pid,) = [pid for pid in _processes() if parent_of(pid) == self.process.pid]
        return pid

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.exit_code()

    def exit_code(self) -> int:
        return self.process.wait(_LONG_S)

    def log_text(self) -> str:
        return self.log.read_text()


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def _stat(pid: int) -> list[str]:
    """State, parent and what follows of ``/proc/PID/stat``; [] of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def parent_of(pid: int) -> int:
    """Its parent's id; 0 for a process that is gone. Needs less of ``/proc`` than a list of children."""
    found = _stat(pid)
    return int(found[1]) if found else 0


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits for its parent does not."""
    found = _stat(pid)
    return bool(found) and found[0] != "Z"


@contextmanager
def serving(folder: Path, *arguments: str, **environment: str) -> Iterator[Served]:
    """``neo serve`` on a port that the system chooses; killed at the end if it still runs."""
    log = folder / "server.log"
    command = [sys.executable, "-m", "neo", "serve", "--port", "0", "--device", DEVICE, "--gpu-threads", "1"]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        found = re.search(r"http://\S+", first)
        assert found, f"{first}{log.read_text()}"
        served = Served(process, found.group(), log)
        with served.http:
            yield served
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def stream_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, checked as strictly as the strictest client does."""
    return events_of(answer.text)


def events_of(text: str) -> list[dict[str, Any]]:
    *events, last = text.split("\n\n")
    assert last == "", "the stream ends with a blank line"
    assert events[-1] == "data: [DONE]"
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
