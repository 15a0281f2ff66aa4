"""The fence: no block that was overwritten while it was read is ever used. Pure.

The owner of a block bumps its generation, with release order, *before* the first new write. The
reader knows the generation g under which the block's bytes were complete. It reads the bytes, waits
until every such read is terminal, and only then reads the generation, in a batch of its own:

    owner    ----- complete, g -----|bump g+1|=== new writes ===
                                    ^ b      ^ w > b
    reader     |== data read ==|  |= generation read =|
               r0            r1   s0 > r1

If any byte of the data read is new, its write is older than r1, so w < r1; then b < w < r1 < s0:
the bump was visible before the generation was read, and the reader sees at least g+1. Conversely,
reading exactly g proves that no new write had begun when the data read ended. The test is
one-sided: a bump between r1 and s0 refuses bytes that were still good, which costs a second pull
and nothing else. Every overlap is detected, whatever the clocks, leases or delays; a lease only
makes an overlap rare.

Generations are 64-bit, only grow, and begin at a random value per incarnation. So no number occurs
twice: not after a wrap, and not from another process at the same address. Comparing for inequality
therefore suffices. A lane may load the 8 bytes one by one; that is harmless: if the
value read equals g, each byte that the bump changes was loaded before the bump was visible, and all
of these loads are later than r1.
"""

from __future__ import annotations

from collections.abc import Sequence


class Fence:
    """Compares the generations of the publication with those that were read afterwards.

    `enabled=False` is for tests alone, which prove with it that the race that they run is real.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled

    def stale(self, expected: Sequence[int], actual: Sequence[int]) -> tuple[int, ...]:
        """Indices whose bytes must be dropped. ValueError when the lengths differ."""
        if len(expected) != len(actual):
            raise ValueError(f"{len(expected)} expected generations for {len(actual)} read")
        if not self._enabled:
            return ()
        pairs = zip(expected, actual, strict=True)
        return tuple(i for i, (published, read) in enumerate(pairs) if published != read)
