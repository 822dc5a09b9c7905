"""What the flags that commands share mean: workloads, ``key=value`` options, sizes, folders."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from neo.core.errors import InputError
from neo.core.plugins import close_matches
from neo.policy.registry import policy_class, policy_options
from neo.workload import Workload, apply_arrivals, read_trace, synthetic

KEY_VARIABLE = "NEO_API_KEY"
"""Where servers and their clients look for the API key."""


def workload_of(
    trace: Path | None,
    format: str | None,
    limit: int | None,
    prompts: str | None,
    outputs: str | None,
    requests: int | None,
    arrivals: str | None,
    rate: float | None,
    speedup: float | None,
    cv: float | None,
    seed: int,
) -> Workload:
    """The workload that the flags of panel "Workload" name."""
    if trace is not None and (prompts or outputs):
        raise InputError("give either --trace or --prompt-lengths and --output-lengths, not both")
    if trace is not None:
        if requests is not None:
            raise InputError("--requests is for synthetic lengths; of a trace, --limit takes the first N")
        workload = read_trace(trace, format, limit)
    elif prompts and outputs:
        if limit is not None:
            raise InputError("--limit is for traces; --requests says how many synthetic ones there are")
        workload = synthetic(prompts, outputs, requests or 1000, seed)
    else:
        raise InputError(
            "no workload: give --trace FILE, or --prompt-lengths and --output-lengths (try azure-code)"
        )
    if arrivals is None:
        if workload.has_arrivals:
            if rate is None and speedup is None and cv is None:
                return workload
            arrivals = "gamma" if cv is not None else "recorded"
        else:
            if speedup is not None:
                raise InputError("--speedup plays recorded arrivals faster, but these requests have no times")
            arrivals = "gamma" if cv is not None else "poisson" if rate is not None else "all-at-once"
    return apply_arrivals(workload, str(arrivals), rate=rate, speedup=speedup, cv=cv, seed=seed)


def key_values(given: Sequence[str] | None, flag: str) -> dict[str, str]:
    """``key=value`` texts as a dict; ``flag`` names them in messages."""
    pairs = {}
    for text in given or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"{flag} {text}: expected key=value")
        pairs[key.strip()] = value.strip()
    return pairs


def options_by_policy(names: Sequence[str], given: dict[str, str]) -> dict[str, dict[str, str]]:
    """Which option goes to which policy: a plain key to every policy that has it, NAME.key to one."""
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    known = {name: {o.name for o in policy_options(policy_class(name))} for name in names}
    for key, value in given.items():
        prefix, dot, plain = key.rpartition(".")
        if dot and prefix in found:
            found[prefix][plain] = value
            continue
        takers = [name for name in names if key in known[name]]
        if not takers:
            everything = sorted({option for options in known.values() for option in options})
            close = close_matches(key, everything) or "."
            whose = f"policy '{names[0]}'" if len(names) == 1 else "none of the policies"
            have = ", ".join(everything) or "none"
            raise InputError(f"--policy-opt {key}: no such option in {whose}{close} Options: {have}")
        for name in takers:
            found[name][key] = value
    return found


_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i)?)?b?\s*", re.IGNORECASE)


def size_of(text: str | None, flag: str) -> int | None:
    """Bytes of '3.5GB', '4GiB', '1000000'."""
    if text is None:
        return None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InputError(f"{flag} {text}: expected a size such as 3.5GB or 4GiB")
    number, prefix, binary = match.groups()
    power = " kmgt".index(prefix.lower()) if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def folder_of(names: Sequence[str], index: int) -> str:
    """The folder of one of several policies' results."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", names[index].rpartition("/")[2])
    return name if names.count(names[index]) == 1 else f"{name}-{index + 1}"
