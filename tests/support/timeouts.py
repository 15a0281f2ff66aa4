"""The time limits of test clusters: one value, from which the flags of their processes come.

A test waits for each limit that it is about, so the limits of test clusters are short. `None` keeps
the product's default.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `start_s` bounds the start of all processes on a machine that others use too."""

    start_s: float = 180.0
    lease_ttl_s: float | None = None
    pull_timeout_s: float | None = None
    quarantine_s: float | None = None
    worker_wait_s: float | None = None
    worker_penalty_s: float | None = None
    worker_hang_s: float | None = None

    @property
    def worker_flags(self) -> tuple[str, ...]:
        """What a worker takes."""
        return _flags(
            {
                "--lease-ttl-s": self.lease_ttl_s,
                "--pull-timeout-s": self.pull_timeout_s,
                "--quarantine-s": self.quarantine_s,
            }
        )

    @property
    def coordinator_flags(self) -> tuple[str, ...]:
        """What a coordinator of workers elsewhere takes."""
        return _flags(
            {
                "--worker-wait-s": self.worker_wait_s,
                "--worker-penalty-s": self.worker_penalty_s,
            }
        )

    @property
    def stack_flags(self) -> tuple[str, ...]:
        """What a coordinator with local workers takes; it hands the workers' on."""
        own = _flags({"--worker-hang-s": self.worker_hang_s})
        return (*self.coordinator_flags, *own, *self.worker_flags)


CLUSTER = Timeouts(lease_ttl_s=3.0, worker_wait_s=20.0, worker_penalty_s=2.0)
LEASE_TTL_S = CLUSTER.lease_ttl_s or 0.0
PENALTY_S = CLUSTER.worker_penalty_s or 0.0


def _flags(limits: dict[str, float | None]) -> tuple[str, ...]:
    pairs = [(name, f"{limit:g}") for name, limit in limits.items() if limit is not None]
    return tuple(word for pair in pairs for word in pair)
