"""Throw malformed requests at a server: schemathesis on its OpenAPI description, then garbage on its socket.

    python -m venv fuzz && fuzz/bin/pip install schemathesis
    python scripts/fuzz_server.py --schemathesis fuzz/bin/schemathesis --examples 3000 --garbage 5000

Starts a server of its own. Prints how many answers of each status there were, by the server's own count,
every request that got no answer or a fault, in full, and the answers that took longest. Ends with 1 if there
was such a request, a Traceback, or a server that no longer answers. The tests do the same, but for
schemathesis.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GOOD = b'{"model": "neo-tiny", "prompt": "a", "max_tokens": 2, "stream": true, "stop": ["b"], "top_p": 0.5}'
FIRST_LINES = (
    b"POST /v1/completions",
    b"POST /v1/chat/completions",
    b"GET /v1/models",
    b"PUT /tokenize",
    b"PRI *",
)
SLOWEST, SHOWN = 3, 2000  # answers that are shown for their length, and characters of their requests


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A few bytes of it replaced, removed, doubled."""
    changed = bytearray(data)
    for _ in range(draw.randrange(1, 6)):
        at = draw.randrange(len(changed) + 1)
        changed[at : at + draw.choice((0, 1, 1, 4, 40))] = draw.randbytes(draw.choice((0, 1, 1, 4, 40)))
    return bytes(changed)


def garbage(port: int, count: int, draw: random.Random, timeout_s: float) -> int:
    """Send that many connections' worth of it; how many got an answer of 500 or above, or none in time."""
    faults = 0
    for i in range(count):
        body = GOOD if i % 3 else mutated(GOOD, draw)
        head = draw.choice(FIRST_LINES) + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        data = draw.randbytes(draw.randrange(600)) if i % 4 == 0 else mutated(head, draw) + body
        with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as sock:
            answer = b""
            try:
                sock.sendall(data)
                if i % 5:
                    sock.shutdown(socket.SHUT_WR)
                    while part := sock.recv(1 << 16):
                        answer += part
            except TimeoutError:
                print(f"garbage {i}: no end of the answer after {timeout_s:g} s: {data!r}: {answer[:300]!r}")
                faults += 1
            except ConnectionError:
                pass  # it may hang up on such a client
        if re.match(rb"HTTP/1\.\d 5", answer):
            print(f"garbage {i}: answered with a fault: {data!r}: {answer[:300]!r}")
            faults += 1
    return faults


def statuses(url: str) -> dict[str, int]:
    """HTTP answers by status, as the server counts them."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        page = answer.read().decode()
    pairs = re.findall(r'^neo:http_requests_total\{.*status="(\d+)".*\} (\S+)$', page, re.MULTILINE)
    return {status: int(float(count)) for status, count in sorted(pairs)}


def findings(report: Path, seed: int) -> list[str]:
    """Lines about schemathesis' report of events: requests without an answer or with a fault, and slow ones.

    With the run's seed and the case's name a request is found again in a run of the same number of examples.
    """
    faults, answered = [], []
    for case, exchange in _exchanges(report):
        response = exchange.get("response")
        if response is None:
            faults.append(f"no answer (seed {seed}, case {case}): {_request_line(exchange)}")
        elif response["status_code"] >= 500:
            status, content = response["status_code"], _bytes(response.get("content"))[:300]
            faults.append(f"{status} (seed {seed}, case {case}): {_request_line(exchange)}: {content!r}")
        else:
            answered.append((response["elapsed"], case, exchange))
    slowest = sorted(answered, key=lambda found: -found[0])[:SLOWEST]
    return faults + [f"took {s:.2f} s (case {c}): {_request_line(e)[:SHOWN]}" for s, c, e in slowest]


def _exchanges(report: Path) -> Iterator[tuple[str, Any]]:
    """(case, request and response) of everything that was sent."""
    with report.open(encoding="utf-8") as lines:
        for line in lines:
            scenario = json.loads(line).get("ScenarioFinished", {})
            yield from scenario.get("recorder", {}).get("interactions", {}).items()


def _request_line(exchange: Any) -> str:
    request = exchange["request"]
    body = _bytes(request.get("body"))
    return f"{request['method']} {request['uri']} {json.dumps(request.get('headers', {}))} {body!r}"


def _bytes(value: Any) -> bytes:
    """Bytes as the report has them."""
    if isinstance(value, dict):
        return base64.b64decode(value["$base64"])
    return str(value or "").encode()


def main() -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemathesis", help="its command; without it only garbage is sent")
    parser.add_argument("--examples", type=int, default=3000, help="for each operation (default: 3000)")
    parser.add_argument("--garbage", type=int, default=5000, help="connections (default: 5000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds that an answer may take")
    args = parser.parse_args()
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "neo", "serve", "--port", "0", "--log-format", "none"]
        command += ["--max-model-len", "48", "--max-queued-requests", "100000"]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        if found is None:
            log.seek(0)
            sys.exit(log.read())
        failed = attack(found.group(), args)
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
        log.seek(0)
        text = log.read()
    print(f"the server ended with {code}" + (f" and said:\n{text}" if "Traceback" in text else ""))
    return int(failed or code != 0 or "Traceback" in text)


def attack(url: str, args: argparse.Namespace) -> bool:
    """Both attacks; whether the server failed."""
    failed = False
    if args.schemathesis:
        start = time.monotonic()
        command = [args.schemathesis, "run", f"{url}/openapi.json", "--checks", "not_a_server_error"]
        command += ["--phases", "fuzzing", "--mode", "all", "--max-examples", str(args.examples)]
        command += ["--seed", str(args.seed), "--workers", "2", "--request-timeout", str(args.timeout)]
        command += ["--suppress-health-check", "all", "--no-color"]
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "events.ndjson"
            command += ["--report", "ndjson", "--report-ndjson-path", str(report)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
            shown = done.stdout.splitlines()[-25 if done.returncode == 0 else -100 :]
            print("\n".join(shown) + done.stderr)
            print("\n".join(findings(report, args.seed)))
        print(f"schemathesis ended with {done.returncode} after {time.monotonic() - start:.0f} s")
        print(f"answers by status: {statuses(url)}")
        failed = done.returncode != 0
    port = int(url.rpartition(":")[2])
    faults = garbage(port, args.garbage, random.Random(args.seed), args.timeout)
    found = statuses(url)
    print(f"{args.garbage} connections of garbage, {faults} answered with a fault; in all {found}")
    with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
        print(f"health: {answer.status}")
    return failed or faults > 0 or any(status >= "500" for status in found)


if __name__ == "__main__":
    sys.exit(main())
