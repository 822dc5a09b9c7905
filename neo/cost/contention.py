"""Two flows that share a resource, as fluids: closed forms for copies and for CPU attention beside copies.

The model: both start together; while both move, each has its shared rate; when one ends, the other goes on
at the rate it has alone. It is exact for two flows of constant rates; start times inside a layer are not
known to an operation, so the overlap it assumes is the largest possible.
"""

from __future__ import annotations

from typing import Any

import numpy as np


class SharedRate:
    """Seconds of a flow of ``own`` bytes beside another flow.

    It moves at ``alone`` bytes/s by itself and at ``shared`` bytes/s while the other flow lasts, which needs
    ``other_seconds`` under sharing. The overlap is ``min(own / shared, other_seconds)``, in it
    ``overlap * shared`` bytes have moved, and the rest moves at ``alone``::

        seconds = overlap + (own - overlap * shared) / alone
                = own / alone + overlap * (1 - shared / alone)

    ``shared`` is taken as at most ``alone``, so that company never helps. Every rounding step is monotone,
    and arrays give bit for bit what scalars give.
    """

    __slots__ = ("loss", "per_byte_alone", "per_byte_shared")

    def __init__(self, alone: float, shared: float) -> None:
        shared = min(shared, alone)
        self.per_byte_alone = 1.0 / alone
        self.per_byte_shared = 1.0 / shared
        self.loss = 1.0 - shared / alone

    def seconds(self, own: float, other_seconds: float) -> float:
        """Seconds of ``own`` bytes while another flow lasts ``other_seconds``."""
        overlap = own * self.per_byte_shared
        if other_seconds < overlap:
            overlap = other_seconds
        return own * self.per_byte_alone + overlap * self.loss

    def seconds_array(self, own: Any, other_seconds: float) -> Any:
        """The same for a float64 array of ``own`` bytes."""
        overlap = np.minimum(own * self.per_byte_shared, other_seconds)
        return own * self.per_byte_alone + overlap * self.loss
