"""The blocks of one sequence, in order.

position  0 .......... | block_size ...... |             position p: block p // block_size,
blocks    b0           | b1                | ...                     offset p % block_size
ids       [b0, b1, ...]  the same as an array, for the model: edited when a block is added
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.scheduling.block_pool import BlockPool

_NONE: NDArray[np.int32] = np.empty(0, np.int32)


class BlockTable:
    """A sequence's references to its blocks: one in the pool for every id in `blocks`."""

    __slots__ = ("_block_size", "_pool", "_room", "blocks", "ids", "num_positions")

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self._pool = pool
        self._block_size = block_size
        self._room = _NONE  # grows by doubling
        self.blocks: list[int] = []
        self.ids = _NONE  # view of `_room`; int32 [len(blocks)]
        self.num_positions = 0  # that fit

    def missing(self, num_tokens: int) -> int:
        """Blocks still to take before `num_tokens` positions fit."""
        return max(0, -(-(num_tokens - self.num_positions) // self._block_size))

    def adopt(self, blocks: list[int]) -> None:
        """Start with prefix hits, which are pinned here."""
        assert not self.blocks, "hits come first"
        self._pool.pin(blocks)
        self._append(blocks)

    def reserve(self, num_tokens: int) -> None:
        """Take blocks until `num_tokens` positions fit, or none at all and raise NoRoom."""
        if num_tokens > self.num_positions:
            self._append(self._pool.take(self.missing(num_tokens)))

    def release(self) -> None:
        """Give up everything."""
        blocks, self.blocks = self.blocks, []
        self._room = self.ids = _NONE
        self.num_positions = 0
        self._pool.release(blocks)

    def _append(self, blocks: list[int]) -> None:
        first = len(self.blocks)
        self.blocks += blocks
        count = len(self.blocks)
        if count > len(self._room):
            room = np.empty(max(16, 2 * count), np.int32)
            room[:first] = self._room[:first]
            self._room = room
        self._room[first:count] = blocks
        self.ids = self._room[:count]
        self.num_positions = count * self._block_size
