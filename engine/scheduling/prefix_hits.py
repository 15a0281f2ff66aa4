"""The longest cached beginning of a sequence that a request can go on from.

    column 0, sees all     b b b b b b b b b .        every block from the first on
    column 1, a window     . . b b . b b b . .        those that a query behind the hit still reads
                                         ^ hit ends here: the next one lacks column 1's

A request whose missing blocks come from a peer begins to compute behind all of them: of the hits it
needs only what a query reads there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.base.kv_columns import first_visible
from engine.base.kv_layout import column_hash
from engine.scheduling.block_pool import BlockPool


@dataclass(frozen=True, slots=True)
class PrefixHits:
    """Cached blocks, not pinned."""

    num_entries: int  # of the block table, that are complete
    columns: tuple[list[int], ...]  # of each the last blocks of these entries

    @property
    def blocks(self) -> list[int]:
        """All of them."""
        return [block for column in self.columns for block in column]


def find_hits(
    pool: BlockPool,
    hashes: Sequence[bytes],
    windows: Sequence[int],
    block_size: int,
    position: int | None = None,
) -> PrefixHits:
    """The hits of a sequence with these block hashes.

    position: where the request begins to compute, at the end of `hashes` or behind it; None: where
    the hits end.
    """
    if len(windows) == 1 and not windows[0]:
        blocks = pool.match(hashes)
        return PrefixHits(len(blocks), (blocks,))
    end = len(hashes)
    while True:
        at = end * block_size if position is None else position
        columns = []
        shorter = end
        for c, window in enumerate(windows):
            first = min(end, first_visible(window, at, block_size))
            wanted = [column_hash(block_hash, c) for block_hash in hashes[first:end]]
            found = pool.match(wanted)
            if len(found) < len(wanted):
                shorter = min(shorter, first + len(found))
            columns.append(found)
        if shorter == end:
            return PrefixHits(end, tuple(columns))
        end = shorter
