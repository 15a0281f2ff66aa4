"""End-to-end checksums of KV blocks, for whoever does not trust what lies between two memories.

    P: block complete, pinned -- CRC-32 --> BlocksReady      D: read, fenced -- CRC-32 --> commit
                                                                      '-- differs: drop, pull anew

A block is one contiguous extent, so its checksum is one pass over its bytes, the sender's from the
memory that is read and the receiver's from the memory that is computed on. The fence says whether a
block was reused while it was read; this says whether its bytes are those that were announced: a bit
that flips in a memory, on a bus or on a wire is found (CRC-32 finds every burst of up to 32 bits,
and misses one in four billion of the rest).

Computing blocks for milliseconds, so it runs in a thread; zlib lets go of the GIL.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence


class Checksums:
    """CRC-32 of this worker's blocks; `read_block` gives the bytes of one. Callable by any thread.

    The blocks must be complete and held meanwhile.
    """

    def __init__(self, read_block: Callable[[int], memoryview]) -> None:
        self._read_block = read_block

    def compute(self, block_ids: Sequence[int]) -> list[int]:
        """One checksum a block; blocks the caller."""
        return [zlib.crc32(self._read_block(block_id)) for block_id in block_ids]

    async def of(self, block_ids: Sequence[int]) -> list[int]:
        """One checksum a block, computed beside the event loop."""
        return await asyncio.to_thread(self.compute, block_ids)

    async def differing(self, block_ids: Sequence[int], expected: Sequence[int]) -> list[int]:
        """Indices of blocks that are not those of `expected`. ValueError: unequal lengths."""
        if len(block_ids) != len(expected):
            raise ValueError(f"{len(expected)} checksums for {len(block_ids)} blocks")
        actual = await self.of(block_ids)
        return [i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b]
