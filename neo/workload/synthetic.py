"""Synthetic workloads: prompt and output lengths drawn from named distributions."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from neo.core.errors import InputError
from neo.workload.azure_shapes import LEVELS, QUANTILES
from neo.workload.base import TraceRequest, Workload, whole_number
from neo.workload.source import MAX_TOKENS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Role = Literal["prompt", "output"]

FORMS = {
    "fixed": "fixed:N",
    "uniform": "uniform:LO:HI",
    "around": "around:MEAN:SPREAD",
    "lognormal": "lognormal:MEAN:SIGMA",
    "azure-code": "azure-code",
    "azure-conv": "azure-conv",
}
GRAMMAR = " | ".join(FORMS.values())
"""How a length distribution is written."""

MAX_SIGMA = 5.0
"""Largest sigma of ``lognormal``: at 5, one draw in a hundred already exceeds 100,000 times the median."""

MAX_REQUESTS = 10_000_000
"""Most requests made at once: some 3 GB of memory (measured: 275 bytes each)."""

_INTEGER = r"(?a:\d{1,9})"
_NUMBER = r"(?a:\d{1,9}(\.\d{1,15})?|\.\d{1,15})"


@dataclass(frozen=True, slots=True)
class Uniform:
    """Integers from ``lo`` to ``hi``, both included, equally likely. One value if they are equal."""

    lo: int
    hi: int

    def sample(self, rng: np.random.Generator, n: int, role: Role) -> NDArray[np.int64]:
        """Draw n lengths in tokens, int64."""
        return rng.integers(self.lo, self.hi, size=n, endpoint=True)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Log-normal with a mean in tokens and the standard deviation of the logarithm.

    The median is ``mean * exp(-sigma**2 / 2)``. Draws are rounded to whole tokens and clipped to
    1..``MAX_TOKENS``.
    """

    mean: float
    sigma: float

    def sample(self, rng: np.random.Generator, n: int, role: Role) -> NDArray[np.int64]:
        """Draw n lengths in tokens, int64."""
        import numpy as np

        drawn = rng.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, size=n)
        return np.clip(np.rint(drawn), 1, MAX_TOKENS).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths shaped like a trace: inverse-CDF samples, linear between the tabulated quantiles."""

    name: str

    def sample(self, rng: np.random.Generator, n: int, role: Role) -> NDArray[np.int64]:
        """Draw n lengths in tokens, int64; prompts and outputs have a table each."""
        import numpy as np

        drawn = np.interp(rng.random(n), LEVELS, QUANTILES[self.name][role])
        return np.rint(drawn).astype(np.int64)


Lengths = Uniform | Lognormal | Shape


def parse_lengths(text: str) -> Lengths:
    """The distribution that a text like ``lognormal:500:0.8`` names.

    ======================== =====================================================================
    ``fixed:N``              always N tokens
    ``uniform:LO:HI``        integers LO to HI, both included
    ``around:MEAN:SPREAD``   integers within ±SPREAD of the mean (``around:1000:0.1``: 900 to 1100)
    ``lognormal:MEAN:SIGMA`` mean in tokens, sigma of the logarithm
    ``azure-code``           shaped like the Azure code trace
    ``azure-conv``           shaped like the Azure conversation trace
    ======================== =====================================================================

    Raises:
        InputError: saying what is wrong and showing the grammar.
    """
    name, *values = text.strip().split(":")
    try:
        if name not in FORMS:
            raise ValueError(f"unknown distribution {name!r}")
        if len(values) != FORMS[name].count(":"):
            raise ValueError(f"expected {FORMS[name]}")
        return _build(name, values)
    except ValueError as problem:
        raise InputError(f"lengths {text!r}: {problem} (grammar: {GRAMMAR})") from None


def _build(name: str, values: list[str]) -> Lengths:
    if name == "fixed":
        tokens = _tokens("N", values[0])
        return Uniform(tokens, tokens)
    if name == "uniform":
        lo, hi = _tokens("LO", values[0]), _tokens("HI", values[1])
        if lo > hi:
            raise ValueError(f"LO {lo} is above HI {hi}")
        return Uniform(lo, hi)
    if name == "around":
        return _around(values[0], values[1])
    if name == "lognormal":
        mean, sigma = _number("MEAN", values[0]), _number("SIGMA", values[1])
        if not 1 <= mean <= MAX_TOKENS:
            raise ValueError(f"MEAN must be from 1 to {MAX_TOKENS} tokens, got {values[0]}")
        if not 0 < sigma <= MAX_SIGMA:
            raise ValueError(f"SIGMA must be above 0 and at most {MAX_SIGMA:g}, got {values[1]}")
        return Lognormal(mean, sigma)
    return Shape(name)


def _around(mean_text: str, spread_text: str) -> Uniform:
    from fractions import Fraction  # floats would lose 1150 from around:1000:0.15

    mean = _tokens("MEAN", mean_text)
    _number("SPREAD", spread_text)
    spread = Fraction(spread_text)
    if spread >= 1:
        raise ValueError(f"SPREAD must be below 1 (0.1 means ±10 %), got {spread_text}")
    hi = math.floor(mean * (1 + spread))
    if hi > MAX_TOKENS:
        raise ValueError(f"lengths reach {hi} tokens, more than {MAX_TOKENS}")
    return Uniform(math.ceil(mean * (1 - spread)), hi)


def _tokens(what: str, text: str) -> int:
    if re.fullmatch(_INTEGER, text) and 1 <= int(text) <= MAX_TOKENS:
        return int(text)
    raise ValueError(f"{what} must be an integer from 1 to {MAX_TOKENS}, got {text!r}")


def _number(what: str, text: str) -> float:
    if re.fullmatch(_NUMBER, text):
        return float(text)
    raise ValueError(f"{what} must be a number like 0.5, got {text!r}")


def synthetic(prompt: str, output: str, n: int, seed: int = 0) -> Workload:
    """A workload of n requests with lengths from two distributions, and no arrivals yet (all at 0).

    Prompt and output lengths are drawn independently, from two streams of the seed, so that changing one
    distribution leaves the other's draws alone. Neither is the stream that ``apply_arrivals`` draws from.

    Args:
        prompt: distribution of prompt lengths, see :func:`parse_lengths`.
        output: distribution of output lengths.
        n: number of requests, at most ``MAX_REQUESTS``.
        seed: the same seed gives the same workload.

    Raises:
        InputError: for a distribution, number or seed that is wrong.
    """
    prompt_lengths, output_lengths = parse_lengths(prompt), parse_lengths(output)
    n, seed = whole_number("number of requests", n), whole_number("seed", seed, 0)
    if n > MAX_REQUESTS:
        raise InputError(f"number of requests: expected at most {MAX_REQUESTS}, got {n}")
    from numpy.random import PCG64, Generator, SeedSequence

    for_prompts, for_outputs = (Generator(PCG64(child)) for child in SeedSequence(seed).spawn(2))
    prompts = prompt_lengths.sample(for_prompts, n, "prompt").tolist()
    outputs = output_lengths.sample(for_outputs, n, "output").tolist()
    requests = tuple(
        TraceRequest(str(number), 0.0, *lengths)
        for number, lengths in enumerate(zip(prompts, outputs, strict=True))
    )
    source = {
        "format": "synthetic",
        "prompt_lengths": prompt.strip(),
        "output_lengths": output.strip(),
        "requests": n,
        "seed": seed,
    }
    return Workload("synthetic", requests, source, has_arrivals=False)
