"""What the data plane has moved."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvtransfer.pull import PullResult


@dataclass(frozen=True, slots=True)
class TransferCounters:
    """Totals since the start, of pulls that ended; the last two are those of the moment."""

    num_pulls: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    num_extents: int = 0
    seconds: float = 0.0  # sum over pulls, which may overlap
    num_stale_blocks: int = 0
    num_failures: int = 0  # pulls that raised
    num_restarts: int = 0  # of the data plane
    num_in_flight: int = 0
    num_quarantined_blocks: int = 0  # destinations of failed pulls that a read may still write

    def with_result(self, result: PullResult) -> TransferCounters:
        """These and one pull that ended well."""
        names = ("num_blocks", "num_bytes", "num_extents", "seconds", "num_stale_blocks")
        sums = {name: getattr(self, name) + getattr(result, name) for name in names}
        return replace(self, num_pulls=self.num_pulls + 1, **sums)
