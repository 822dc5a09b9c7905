"""One server for all tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("torch", reason="the engine needs torch")
pytest.importorskip("transformers", reason="chat templates need transformers")
pytest.importorskip("fastapi", reason="the server needs fastapi")
pytest.importorskip("httpx", reason="the tests' client is httpx")

from serving import QUEUE, Served, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """``neo serve`` with nothing but its defaults, and a queue that 2000 clients overflow."""
    folder = tmp_path_factory.mktemp("serve")
    with serving(folder, "--max-queued-requests", str(QUEUE)) as served:
        yield served
