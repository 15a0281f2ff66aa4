"""The rows of all workers. Each change of a row passes `put` or `remove`, and drops the cached
snapshot: a snapshot that is older than the table cannot be read.

    put, remove --> rows by worker_id --> snapshot(): one tuple, until the next change
                          |
                          '--> expired(now): rows that are past `expires_s`; they are searched
                               only when the earliest of these moments has passed
"""

from __future__ import annotations

import math

from coordinator.cluster.worker import Worker


class WorkerTable:
    """Rows in order of worker_id. Owned by Membership."""

    def __init__(self) -> None:
        self._rows: dict[str, Worker] = {}  # in order of worker_id
        self._snapshot: tuple[Worker, ...] | None = ()
        self._expires_s = math.inf  # no row expires earlier

    def get(self, worker_id: str) -> Worker | None:
        """The row of a worker, or None."""
        return self._rows.get(worker_id)

    def put(self, worker: Worker) -> None:
        """Add a row, or replace the row of the same worker_id."""
        is_new = worker.peer.worker_id not in self._rows
        self._rows[worker.peer.worker_id] = worker
        if is_new:
            self._rows = dict(sorted(self._rows.items()))
        self._expires_s = min(self._expires_s, worker.expires_s)
        self._snapshot = None

    def remove(self, worker_id: str) -> None:
        """Remove a row that is there."""
        del self._rows[worker_id]
        self._snapshot = None

    def snapshot(self) -> tuple[Worker, ...]:
        """All rows, in order of worker_id."""
        if self._snapshot is None:
            self._snapshot = tuple(self._rows.values())
        return self._snapshot

    def expired(self, now_s: float) -> list[Worker]:
        """Rows that are past their `expires_s`."""
        if now_s <= self._expires_s:
            return []
        rows = self.snapshot()
        self._expires_s = min((w.expires_s for w in rows), default=math.inf)
        return [w for w in rows if now_s > w.expires_s]
