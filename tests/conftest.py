"""Fixtures shared by every test."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("neo", deadline=None)  # how long an example takes says more about the machine
settings.load_profile("neo")


@pytest.fixture(scope="session")
def traces_dir() -> Path:
    """Where the real request traces are: $NEO_TRACES, or shared/traces beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "traces"
    found = Path(os.environ.get("NEO_TRACES") or beside)
    if not found.is_dir():
        pytest.skip(f"no request traces in {found}; set NEO_TRACES to where they are")
    return found
