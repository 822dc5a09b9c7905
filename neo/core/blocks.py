"""BlockPool: paged KV accounting of one tier.

The unit is the *layer-block*: room for ``block_size`` tokens of K and V in one layer. A request with T
tokens whose KV is wholly on one tier holds ``ceil(T / block_size) * layers`` layer-blocks there; a request
split over both tiers holds, per tier, as many as it has layers there. Which physical block is which is the
engine's affair: counts that always fit are what the Scheduler promises it.
"""

from __future__ import annotations

from neo.core.errors import InputError
from neo.core.request import Tier


def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks of ``block_size`` tokens that hold ``tokens`` tokens."""
    return -(-tokens // block_size)


class BlockPool:
    """The layer-blocks of one tier: who holds how many.

    ``staging_layers`` sets aside room for that many layers' KV of a full pool (NEO section 3: one layer, in
    which KV bound for the CPU waits for its copy). Of N blocks, ``floor(N * L / (L + staging_layers))``
    remain for requests; staged KV may use as many blocks, one layer each.

    Attributes:
        blocks: usable blocks (whole model: each counts ``layers`` layer-blocks).
        total: usable layer-blocks.
        used: layer-blocks held by requests.
    """

    __slots__ = (
        "_held",
        "block_size",
        "blocks",
        "layers",
        "staging_blocks",
        "staging_layers",
        "tier",
        "total",
        "used",
    )

    def __init__(
        self, tier: Tier, blocks: int, layers: int, block_size: int, staging_layers: int = 0
    ) -> None:
        if blocks < 0 or layers < 1 or block_size < 1 or staging_layers < 0:
            raise InputError(
                f"{tier} pool: blocks={blocks}, layers={layers}, block_size={block_size}, "
                f"staging_layers={staging_layers} is not a pool"
            )
        self.tier = tier
        self.layers = layers
        self.block_size = block_size
        self.staging_layers = staging_layers
        self.blocks = blocks * layers // (layers + staging_layers)
        self.staging_blocks = self.blocks if staging_layers else 0
        self.total = self.blocks * layers
        self.used = 0
        self._held: dict[str, int] = {}

    @property
    def free(self) -> int:
        """Layer-blocks nobody holds."""
        return self.total - self.used

    @property
    def tokens(self) -> int:
        """Tokens of whole-model KV that the pool can hold."""
        return self.blocks * self.block_size

    def held(self, owner: str) -> int:
        """Layer-blocks that ``owner`` holds."""
        return self._held.get(owner, 0)

    def take(self, owner: str, layer_blocks: int) -> None:
        """Give ``owner`` more layer-blocks. ``validate.check`` has made sure they are there."""
        if layer_blocks > self.total - self.used:
            raise AssertionError(
                f"{self.tier} pool: {layer_blocks} layer-blocks for {owner}, {self.free} of {self.total} free"
            )
        self.used += layer_blocks
        self._held[owner] = self._held.get(owner, 0) + layer_blocks

    def release(self, owner: str, layer_blocks: int | None = None) -> int:
        """Take back ``layer_blocks`` of ``owner`` (all of them by default); returns how many."""
        held = self._held.get(owner, 0)
        count = held if layer_blocks is None else layer_blocks
        if count > held:
            raise AssertionError(
                f"{self.tier} pool: {owner} holds {held} layer-blocks, cannot release {count}"
            )
        if count == held:
            self._held.pop(owner, None)
        else:
            self._held[owner] = held - count
        self.used -= count
        return count

    def holders(self) -> dict[str, int]:
        """Layer-blocks by owner (a copy), for integrity checks."""
        return dict(self._held)
