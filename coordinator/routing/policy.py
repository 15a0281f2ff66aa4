"""Where a request goes: a pure function of a snapshot of the workers."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from coordinator.cluster.membership import Worker, WorkerState
from engine.base.types import Role

MANY_WAITING = 4  # requests more than elsewhere: what is in a cache is not worth that queue


def pick(
    workers: Iterable[Worker], role: Role, exclude: Collection[str] = (), num_tokens: int = 0
) -> Worker | None:
    """The least loaded ready worker of `role` whose incarnation is not in `exclude`, or None.

    It must hold `num_tokens`: of decode the longest that prompt and answer may become, of prefill
    the prompt's whole blocks.
    Least loaded: fewest prompt tokens waiting, then fewest requests, then the lowest id, so that
    equal snapshots give equal picks. A doubtful decode worker comes after all others; a doubtful
    prefill worker is not picked, for a decode worker can do without.
    """
    candidates = _ready(workers, role, exclude)
    candidates = [w for w in candidates if w.model.max_model_len >= num_tokens]
    if role is Role.PREFILL:
        candidates = [w for w in candidates if not w.degraded]
    return min(candidates, key=_weight, default=None)


def sticky(
    workers: Iterable[Worker], role: Role, incarnation: str, exclude: Collection[str] = ()
) -> Worker | None:
    """The worker of `role` that has a request's blocks already, unless another one is the better
    choice all the same: it is doubtful, or many more requests wait there than elsewhere.
    """
    ready = [w for w in _ready(workers, role, exclude) if not w.degraded]
    fewest_waiting = min((w.load.num_waiting for w in ready), default=0)
    for worker in ready:
        if worker.peer.incarnation == incarnation:
            behind = worker.load.num_waiting > fewest_waiting + MANY_WAITING
            return None if behind else worker
    return None


def _ready(workers: Iterable[Worker], role: Role, exclude: Collection[str]) -> list[Worker]:
    return [
        w
        for w in workers
        if w.role is role and w.state is WorkerState.READY and w.peer.incarnation not in exclude
    ]


def _weight(worker: Worker) -> tuple[bool, int, int, str]:
    """What is known to be there: a heartbeat counts everybody's, but late; our count is exact."""
    load = worker.load
    return (
        worker.degraded,
        max(load.waiting_tokens, worker.assigned_tokens),
        max(load.num_running + load.num_waiting, worker.assigned_requests),
        worker.peer.worker_id,
    )
