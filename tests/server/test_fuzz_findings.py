"""What the fuzzing script says of requests that went wrong: all that is needed to send them again."""

from __future__ import annotations

import base64
import json
import random
import runpy
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts/fuzz_server.py"))


def coded(data: bytes) -> dict[str, str]:
    return {"$base64": base64.b64encode(data).decode()}


def exchange(body: bytes | None, status: int | None, seconds: float = 0.0) -> dict[str, Any]:
    request = {"method": "POST", "uri": "http://a:1/tokenize", "headers": {"X": ["y"]}}
    if body is not None:
        request["body"] = coded(body)
    if status is None:
        return {"request": request}
    response = {"status_code": status, "content": coded(b"oh no"), "elapsed": seconds, "headers": {}}
    return {"request": request, "response": response}


def test_requests_without_an_answer_and_with_a_fault_are_shown_in_full(tmp_path: Path) -> None:
    report = tmp_path / "events.ndjson"
    sent = b'{"prompt": "\xff' + b"a" * 5000
    cases = {
        "c1": exchange(sent, None),
        "c2": exchange(None, 503),
        **{f"fast{i}": exchange(b"{}", 200, 0.01 * i) for i in range(9)},
        "slow": exchange(sent, 400, 9.5),
    }
    events = [{"Initialize": {"seed": 7}}, {"ScenarioFinished": {"recorder": {"interactions": cases}}}]
    report.write_text("".join(json.dumps(event) + "\n" for event in events))
    first, second, slow, *rest = SCRIPT["findings"](report, 7)
    assert first == f'no answer (seed 7, case c1): POST http://a:1/tokenize {{"X": ["y"]}} {sent!r}'
    assert second.startswith("503 (seed 7, case c2): POST http://a:1/tokenize")
    assert second.endswith("b'oh no'")
    assert slow.startswith("took 9.50 s (case slow): POST")
    assert len(slow) < 3000
    assert [line.split(":")[0] for line in rest] == ["took 0.08 s (case fast8)", "took 0.07 s (case fast7)"]


def test_garbage_that_gets_no_answer_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        held: list[socket.socket] = []

        def accept() -> None:
            held.extend(silent.accept()[0] for _ in range(2))

        thread = threading.Thread(target=accept)
        thread.start()
        faults = SCRIPT["garbage"](silent.getsockname()[1], 2, random.Random(1), 0.1)
        thread.join()
        for connection in held:
            connection.close()
    assert faults == 1  # of the first one no answer is awaited
    assert capsys.readouterr().out.startswith("garbage 1: no end of the answer after 0.1 s: b'")
