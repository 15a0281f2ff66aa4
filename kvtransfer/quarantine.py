"""How much memory reads that do not end may keep, and for how long. Pure.

A pull that failed keeps its destination until its last read is terminal: usually milliseconds. A
read from a peer that hangs may never end, and releasing its handle does not stop it. Only the end
of the transport frees that memory, so the data plane ends it when either bound is reached:

    failed --PATIENCE_S--> stuck --max_s since it failed, or too many stuck blocks--> restart
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvtransfer.pull import QUIET_S, Reading

PATIENCE_S = 2 * QUIET_S  # a failed pull whose reads end within this time is not stuck


@dataclass(frozen=True, slots=True)
class Quarantine:
    """The two bounds."""

    max_s: float = 60.0
    share: float = 0.25  # of the pool's blocks

    def exceeded(self, readings: Iterable[Reading], num_blocks: int, now: float) -> str:
        """Why the transport must end; "" while both bounds hold."""
        patience_s = min(PATIENCE_S, self.max_s)
        stuck = [r for r in readings if r.has_reads and now >= r.failed_at + patience_s]
        if not stuck:
            return ""
        oldest = min(stuck, key=lambda reading: reading.failed_at)
        if now >= oldest.failed_at + self.max_s:
            peer = oldest.request.pool.incarnation
            return f"a read from peer {peer} did not end within {self.max_s:g} s of its failure"
        num_stuck = sum(reading.num_unsettled_blocks for reading in stuck)
        if num_stuck >= self.share * num_blocks:
            return f"{num_stuck} of {num_blocks} blocks are kept by reads that do not end"
        return ""
