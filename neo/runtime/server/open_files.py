"""How many connections a process may have: each is an open file."""

from __future__ import annotations

from contextlib import suppress

_FILES = 65_536


def raise_file_limit() -> None:
    """Take as many open files as the system lets us."""
    try:
        import resource
    except ImportError:  # not on this system
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft < wanted:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
