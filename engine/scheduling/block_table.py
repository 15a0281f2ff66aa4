"""The blocks of one sequence, in order.

Position p lives in block p // block_size at offset p % block_size.
"""

from __future__ import annotations

from engine.scheduling.block_pool import BlockPool


class BlockTable:
    """A sequence's hold on its blocks. Every id in `blocks` is one reference in the pool."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self.blocks: list[int] = []

    def missing(self, num_tokens: int) -> int:
        """Blocks still to take before `num_tokens` positions fit."""
        return max(0, -(-num_tokens // self._block_size) - len(self.blocks))

    def adopt(self, blocks: list[int]) -> None:
        """Start with prefix hits, pinned here."""
        assert not self.blocks, "hits come first"
        self._pool.pin(blocks)
        self.blocks = list(blocks)

    def reserve(self, num_tokens: int) -> None:
        """Take blocks until `num_tokens` positions fit, or none at all and raise NoRoom."""
        self.blocks += self._pool.take(self.missing(num_tokens))

    def release(self) -> None:
        """Give up everything."""
        blocks, self.blocks = self.blocks, []
        self._pool.release(blocks)
