"""Where a request goes: a pure function of a snapshot of the workers."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from coordinator.membership import Worker, WorkerState
from engine.types import Role


def pick(workers: Iterable[Worker], role: Role, exclude: Collection[str] = ()) -> Worker | None:
    """The least loaded ready worker of `role` whose incarnation is not in `exclude`, or None.

    Least loaded: fewest prompt tokens waiting, then fewest requests, then the lowest id, so that
    equal snapshots give equal picks. A doubtful decode worker comes after all others; a doubtful
    prefill worker is not picked, for a decode worker can do without.
    """
    candidates = (
        w
        for w in workers
        if w.role is role
        and w.state is WorkerState.READY
        and w.peer.incarnation not in exclude
        and not (w.doubtful and role is Role.PREFILL)
    )
    return min(candidates, key=_weight, default=None)


def _weight(worker: Worker) -> tuple[bool, int, int, str]:
    """What is known to be there: a heartbeat counts everybody's, but late; our count is exact."""
    load = worker.load
    return (
        worker.doubtful,
        max(load.waiting_tokens, worker.assigned_tokens),
        max(load.num_running + load.num_waiting, worker.assigned_requests),
        worker.peer.worker_id,
    )
