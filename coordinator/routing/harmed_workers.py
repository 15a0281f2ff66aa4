"""How many workers one request may take down with it.

    its worker is lost                    1   it goes on elsewhere, at once
    again, without a token in between     2   a suspect: it goes on while no other suspect is tried
    again                                 3   ended as WorkersLost
    a token                               0

A worker is lost when its process ended, fell silent or computed nonsense under the request. Of the
requests that were on such a worker one may be the cause. Those that get a token are not. The others
are separated by the trial: at the third worker a suspect is the only one.

Workers that were lost without the request, nor under one that was ended for it, are evidence for
it: where they are as many, the cluster is the cause, or another request that still runs. So that
several requests do not excuse each other without end, one ends at `MOST_HARMED` all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Container

from coordinator.cluster.worker import Worker
from engine.base.errors import WorkersLost

MAX_HARMED = 3  # workers; see above
MOST_HARMED = 6  # whatever else was lost
_TRIAL_S = 10.0  # a suspect that has harmed nothing for so long lets the next one begin


class Trial:
    """Which suspect is being tried. Shared by the requests of a coordinator."""

    def __init__(self) -> None:
        self._owner: HarmedWorkers | None = None
        self._ends_s = 0.0

    def begin(self, owner: HarmedWorkers, now_s: float) -> bool:
        """False while another one is tried."""
        if self._owner not in (None, owner) and now_s < self._ends_s:
            return False
        self._owner, self._ends_s = owner, now_s + _TRIAL_S
        return True

    def end(self, owner: HarmedWorkers) -> bool:
        """Whether it was `owner` that was tried."""
        was = self._owner is owner
        if was:
            self._owner = None
        return was


class HarmedWorkers:
    """The workers that were lost under one request since its last token. Owned by its Retry."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self.workers: dict[str, str] = {}  # incarnation -> worker_id

    def may_begin(self, now_s: float) -> bool:
        """Whether an attempt may begin now."""
        return len(self.workers) < MAX_HARMED - 1 or self._trial.begin(self, now_s)

    def add(
        self, worker: Worker, num_lost_beside: Callable[[Container[str]], int]
    ) -> WorkersLost | None:
        """`worker` was lost under the request; an error where that is enough.

        `num_lost_beside`: how many workers were lost lately that are not among some incarnations.
        """
        self.workers[worker.peer.incarnation] = worker.peer.worker_id
        num = len(self.workers)
        if num < MAX_HARMED or (num < MOST_HARMED and num_lost_beside(self.workers) >= num):
            return None
        return WorkersLost(
            f"{num} workers were lost under this request without a token in between; it is not"
            " sent to more"
        )

    def clear(self) -> bool:
        """A token came; whether that ends a trial."""
        had = bool(self.workers)
        self.workers.clear()
        return had and self.end_trial()

    def end_trial(self) -> bool:
        """The attempt is over. True: it was on trial, and the next suspect may begin."""
        return self._trial.end(self)
