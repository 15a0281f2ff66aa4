"""End-to-end checksums of KV blocks: they find bits that change between two memories.

    P: block complete, pinned -- CRC-32 --> BlocksReady      D: read, fenced -- CRC-32 --> commit
                                                                      '-- differs: drop, pull anew

A block is one contiguous extent, so its checksum is one pass over its bytes. The sender takes it
from the memory that is read, the receiver from the memory that it computes on. The fence detects
that a block was reused while it was read. The checksum detects that its bytes are not those that
were published: a bit that flips in a memory, on a bus or on a wire. CRC-32 finds every burst of up
to 32 bits, and misses one in four billion of the other errors.

A checksum takes milliseconds, so it is computed in a thread; zlib releases the GIL.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence


class Checksums:
    """CRC-32 of this worker's blocks, for any thread; `read_block` returns the bytes of one.

    The blocks must be complete and held meanwhile.
    """

    def __init__(self, read_block: Callable[[int], memoryview]) -> None:
        self._read_block = read_block

    def compute(self, block_ids: Sequence[int]) -> list[int]:
        """One checksum a block; the caller waits."""
        return [zlib.crc32(self._read_block(block_id)) for block_id in block_ids]

    async def of(self, block_ids: Sequence[int]) -> list[int]:
        """One checksum a block, computed beside the event loop."""
        return await asyncio.to_thread(self.compute, block_ids)

    async def differing(self, block_ids: Sequence[int], expected: Sequence[int]) -> list[int]:
        """Indices of blocks whose checksum is not the expected one. ValueError: unequal lengths."""
        if len(block_ids) != len(expected):
            raise ValueError(f"{len(expected)} checksums for {len(block_ids)} blocks")
        actual = await self.of(block_ids)
        return [i for i, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b]
