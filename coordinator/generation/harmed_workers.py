"""How many workers one request may take down with it.

    its worker is lost                    1   it goes on elsewhere, at once
    again, without a token in between     2   a suspect: it goes on while no other suspect is tried
    again                                 3   ended as WorkersLost
    a token                               0

Lost is a worker process that ended, fell silent or computed nonsense under the request. Of the
requests that were on such a worker one may be the cause. Those that get a token are not, and the
rest are told apart by the trial: at the third worker a suspect is the only one. Workers that were
lost without the request, nor under one that was ended for it, speak for it: where they are as many,
the cluster is to blame, or another request that is still here. So that several do not excuse each
other without end, one ends at `MOST_HARMED` all the same.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator.cluster.membership import Membership, Worker
from engine.base.errors import WorkersLost
from engine.telemetry.log import get_logger

_log = get_logger(__name__)

MAX_HARMED = 3  # workers; see above
MOST_HARMED = 6  # whatever else was lost
_TRIAL_S = 10.0  # a suspect that has harmed nothing for so long lets the next one begin


class Trial:
    """Which suspect is being tried. Shared by the requests of a coordinator."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._owner: HarmedWorkers | None = None
        self._ends_s = 0.0

    def begin(self, owner: HarmedWorkers) -> bool:
        """False while another one is tried."""
        now = self._clock()
        if self._owner not in (None, owner) and now < self._ends_s:
            return False
        self._owner, self._ends_s = owner, now + _TRIAL_S
        return True

    def end(self, owner: HarmedWorkers) -> bool:
        """Whether it was `owner` that was tried."""
        was = self._owner is owner
        if was:
            self._owner = None
        return was


class HarmedWorkers:
    """What one request has done, as far as is known. Owned by its dispatch."""

    def __init__(self, membership: Membership, trial: Trial) -> None:
        self._membership = membership
        self._trial = trial
        self._workers: dict[str, str] = {}  # incarnation -> worker_id, since the last token

    def may_begin(self) -> bool:
        """Whether an attempt may begin now."""
        return len(self._workers) < MAX_HARMED - 1 or self._trial.begin(self)

    def add(self, worker: Worker) -> None:
        """`worker` was lost under the request. Raises WorkersLost where that is enough."""
        self.end_trial()
        self._workers[worker.peer.incarnation] = worker.peer.worker_id
        num = len(self._workers)
        beside = self._membership.num_lost_beside(self._workers)
        if num < MAX_HARMED or (num < MOST_HARMED and beside >= num):
            return
        self._membership.explain_losses(self._workers)  # they speak for no other request
        _log.error(
            "request given up: workers were lost under it",
            workers=list(self._workers.values()),
        )
        raise WorkersLost(
            f"{num} workers were lost under this request without a token in between; it is not"
            " sent to more"
        )

    def clear(self) -> None:
        """A token came."""
        if self._workers:
            self._workers.clear()
            self.end_trial()

    def end_trial(self) -> None:
        """The attempt is over: the next suspect may begin."""
        if self._trial.end(self):
            self._membership.wake()
