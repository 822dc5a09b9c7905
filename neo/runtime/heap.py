"""Garbage collection beside a loop that must not stop for it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled_heap() -> Iterator[None]:
    """Leave out of all collections what is there now: hundreds of thousands of objects, most of imports.

    A full collection looks at each of them, for 50 ms in a server's HTTP process and 130 ms beside torch, and
    comes whenever enough has been made since the last one.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
