"""Loading what a user brings: an object from a Python file or an installed module, with one-line errors."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from neo.core.errors import InputError


def close_matches(name: str, known: Iterable[str]) -> str:
    """``", did you mean 'x'?"`` for a misspelt ``name``, or an empty string where nothing known is close."""
    by_lower = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.6)
    if not found:
        return ""
    return ", did you mean " + " or ".join(f"'{by_lower[f]}'" for f in found) + "?"


def load_object(spec: str, kind: str) -> Any:
    """The object that ``spec`` names: ``path/to/file.py:Name`` or ``package.module:Name``.

    Args:
        spec: where it is.
        kind: what it is, for messages: ``"policy"``, ``"cost model"``.

    Raises:
        InputError: one line with the file and what failed: no such file, or none of Python, a syntax error
            with its line, an exception while importing with its line, or a missing name with close matches.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name or name.endswith(".py"):
        raise InputError(f"{kind} '{spec}': give the file and the name in it, as path/to/file.py:Name")
    if "/" in where and not where.endswith(".py"):
        raise InputError(f"{kind} '{where}': no Python file, whose name ends in .py")
    module = _import_file(where, kind) if where.endswith(".py") else _import_module(where, kind)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(module) if not n.startswith("_")]
            raise InputError(f"{kind} '{spec}': {where} has no '{name}'{close_matches(name, names)}")
        found = getattr(found, part)
    return found


def _import_file(where: str, kind: str) -> ModuleType:
    path = Path(where).expanduser()
    if not path.is_file():
        raise InputError(f"{kind} '{where}': no such file")
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    module_name = f"neo_user_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{kind} '{where}': not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up here
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # so that a file can import what lies beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(module_name, None)
        raise InputError(f"{kind} '{where}': {_one_line(error, path)}") from error
    finally:
        sys.path.remove(folder)
    return module


def _import_module(name: str, kind: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise InputError(f"{kind} '{name}': cannot be imported: {_one_line(error, None)}") from error


def _one_line(error: BaseException, path: Path | None) -> str:
    """What went wrong while importing, with the line of ``path`` where it did."""
    if isinstance(error, SyntaxError):
        place = f"{Path(error.filename).name}, " if error.filename and path is None else ""
        return f"{place}line {error.lineno}: syntax error: {error.msg}"
    line = _line_in(error, path) if path is not None else None
    text = " ".join(str(error).split())
    return (f"line {line}: " if line else "") + type(error).__name__ + (f": {text}" if text else "")


def _line_in(error: BaseException, path: Path) -> int | None:
    """Line of ``path`` that was running when ``error`` was raised (the innermost, if there are several)."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
