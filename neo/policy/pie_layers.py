"""Which layers of ``pie`` live on the host: levels, from none to all but one, each within the next.

Everything here is our reconstruction; the paper's rule is not known to us.
"""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=64)
def masks(layers: int) -> tuple[int, ...]:
    """``masks[h]`` is the bit mask of the h host layers of level h, for h = 0 .. layers - 1.

    Spread as evenly as levels within each other can be (van der Corput's sequence), so that a transfer has
    about ``layers / h`` layers of computation to hide behind; counted from the last layer, because nothing
    has been computed yet behind which layer 0 could hide.
    """
    bits = max(1, (layers - 1).bit_length())
    order: dict[int, None] = {}
    for i in range(1 << bits):
        reversed_bits = int(f"{i:0{bits}b}"[::-1], 2)
        order.setdefault(layers - 1 - (reversed_bits * layers >> bits))
    found = [0]
    for layer in list(order)[: layers - 1]:
        found.append(found[-1] | 1 << layer)
    return tuple(found)


def levels(layers: int, ring: int) -> tuple[int, ...]:
    """The levels worth having: none, and those that free more layers than the ring of buffers takes."""
    return (0, *range(ring + 1, layers))


@lru_cache(maxsize=4096)
def ranges(mask: int) -> tuple[tuple[int, int], ...]:
    """The layers of a bit mask as ranges (start, stop), in ascending order."""
    found = []
    start = 0
    while mask >> start:
        while not mask >> start & 1:
            start += 1
        stop = start
        while mask >> stop & 1:
            stop += 1
        found.append((start, stop))
        start = stop
    return tuple(found)
