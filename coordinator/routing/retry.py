"""Whether and when a request is tried again. Decisions only: another module calls and waits.

    next() --Plan--------> the attempt --tokens--> progressed()
      ^ '--Wait----> next() again            |
      |                                      | lost: D, or its prefill worker
      |                                   failed()
      |                                      v
      '------------------- None ---------- after_failure() --Wait--> after_failure() again
                                             '--GiveUp(error): the request ends

A decision gets a view of the cluster; the moment of the view is the only time that counts. Waiting
longer or shorter than a `Wait` asks changes no decision, only the moment when it is made.

- A decode worker is passed over while another one has failed less often; one that is ready may be
  tried again. Where none is ready, the request waits for one.
- A prefill worker that failed is not used again: the decode worker can compute the prompt. One that
  had no part in a failure is kept, for it probably has the prompt's blocks.
- A worker that fails one request is penalized for a while, for all requests. A worker that found
  its own numbers not finite is accused only when another one has computed what it could not: a
  request may be the reason, too.
- A request under which one worker after the other is lost ends (`harmed_workers.py`).
- An output that one model began is not continued by another model, which may come under the same
  name when all workers of the first one have gone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from coordinator.cluster.membership import Membership
from coordinator.cluster.worker import ClusterView, Worker
from coordinator.routing.affinity import Affinity, model_tag
from coordinator.routing.harmed_workers import HarmedWorkers, Trial
from coordinator.routing.policy import Plan, Policy, RequestView
from engine.base.errors import DeadlineExceeded, DiptychError, Mismatch, Unavailable, WorkerLost
from engine.base.types import Role

MAX_ATTEMPTS = 8  # in a row without a new token
FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0
_LOOK_S = 1.0  # silence and penalties end without an event


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask again after `timeout_s`, or earlier when the cluster has changed."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the request with this error."""

    error: DiptychError
    harmed: tuple[str, ...] = ()  # worker_ids that were lost under it, where that is why


@dataclass(frozen=True, slots=True)
class _Failure:
    """A lost attempt, until its consequences are decided."""

    error: Unavailable
    lost: Worker
    is_prefill: bool  # it was the prefill worker of the attempt
    judged_s: float  # when they are decided; monotonic


@dataclass(eq=False)
class Retry:
    """The attempts of one choice of a request. Moments are those of the views' clock.

    Attempts report what they reveal about workers to `membership`, which has that clock.
    """

    policy: Policy
    membership: Membership
    worker_wait_s: float  # how long an attempt waits for a decode worker
    deadline_s: float
    # The longest that prompt and output may become; a decode worker holds it.
    max_tokens: int = 0
    affinity: Affinity = field(default_factory=Affinity)
    trial: Trial = field(default_factory=Trial)
    _failures: Counter[str] = field(default_factory=Counter)  # by incarnation
    _num_failed: int = 0  # since the last new token
    _plan: Plan | None = None  # of the last attempt
    _waits_until_s: float | None = None  # for a decode worker; None: it does not wait
    _failure: _Failure | None = None  # not judged yet
    _suspects: list[tuple[Worker, Worker]] = field(
        default_factory=list
    )  # not finite numbers: of, found by

    def __post_init__(self) -> None:
        self._harm = HarmedWorkers(self.trial)

    def next(
        self, cluster: ClusterView, num_tokens: int, *, computes_alone: bool = False
    ) -> Plan | Wait | GiveUp:
        """The next attempt, for `num_tokens` of prompt and output so far.

        `computes_alone`: the decode worker computes the prompt itself. Gives up with Unavailable,
        DeadlineExceeded, or Mismatch where only workers of another model are ready.
        """
        if self._waits_until_s is None:
            self._waits_until_s = cluster.now_s + self.worker_wait_s
        decision = self._next(cluster, num_tokens, computes_alone, self._waits_until_s)
        if not isinstance(decision, Wait):
            self._waits_until_s = None
        return decision

    def _next(
        self, cluster: ClusterView, num_tokens: int, computes_alone: bool, waits_until_s: float
    ) -> Plan | Wait | GiveUp:
        affinity, now_s = self.affinity, cluster.now_s
        if affinity.model and _is_replaced(affinity.model, cluster):
            return GiveUp(
                Mismatch(
                    "the workers' model was replaced after this answer had begun; ask for it anew,"
                    " without `resume`"
                )
            )
        request = RequestView(
            num_tokens,
            max_tokens=self.max_tokens,
            computes_alone=computes_alone,
            model=affinity.model,
            sticky_decode=affinity.decode,
            sticky_prefill=affinity.prefill,
            failures=dict(self._failures),
        )
        plan = self.policy(cluster, request)
        if plan and self._harm.may_begin(now_s):
            affinity.decode = plan.decode.peer.incarnation
            if plan.prefill and (self._failures or not affinity.prefill):
                affinity.prefill = plan.prefill.peer.incarnation
            self._plan = plan
            return plan
        if now_s < waits_until_s:
            return self._wait(cluster, min(waits_until_s, now_s + _LOOK_S))
        if plan:
            return GiveUp(
                Unavailable("workers were lost under this request, and others are tried first")
            )
        fitting = f" for {self.max_tokens} tokens" if cluster.ready(Role.DECODE) else ""
        return GiveUp(
            Unavailable(
                f"no decode worker{fitting} is ready (waited {self.worker_wait_s:g} s)",
                retry_after_s=min(max(self.worker_wait_s, 1.0), 5.0),
            )
        )

    def _wait(self, cluster: ClusterView, until_s: float) -> Wait | GiveUp:
        """Until a moment, the deadline at most."""
        if cluster.now_s >= self.deadline_s:
            return GiveUp(DeadlineExceeded("the request's time ran out"))
        return Wait(min(until_s, self.deadline_s) - cluster.now_s)

    def progressed(self) -> None:
        """New tokens came: earlier failures no longer count."""
        self._num_failed = 0
        if self._plan is None:
            return
        if not self.affinity.model:
            self.affinity.model = model_tag(self._plan.decode)
        used = {w.peer.incarnation for w in (self._plan.decode, self._plan.prefill) if w}
        for suspect, witness in self._suspects:
            if suspect.peer.incarnation not in used:
                self.membership.accuse(suspect, witness)
        self._suspects = []
        if self._harm.clear():
            self.membership.wake()

    def close(self) -> None:
        """The attempt is over, however it ended."""
        if self._harm.end_trial():
            self.membership.wake()

    def failed(self, plan: Plan, error: Unavailable, now_s: float) -> None:
        """An attempt was lost. `after_failure` decides what follows."""
        lost = plan.decode
        if error.lost == Role.PREFILL.value and plan.prefill is not None:
            lost = plan.prefill
        elif self.affinity.decode == lost.peer.incarnation:
            self.affinity.decode = ""
        self._failures[lost.peer.incarnation] += 1
        self.membership.penalize(lost)
        if error.sick:
            witnesses = [witness.peer for _, witness in self._suspects]
            if lost is not plan.decode and plan.decode.peer in witnesses:
                self._failures[plan.decode.peer.incarnation] += 1  # it may be the damaged one
                self.affinity.decode = ""
            self._suspects.append((lost, plan.decode))
        backoff_s = min(FIRST_BACKOFF_S * 2**self._num_failed, MAX_BACKOFF_S)
        self._num_failed += 1
        self._failure = _Failure(error, lost, lost is plan.prefill, now_s + backoff_s)

    def after_failure(self, cluster: ClusterView) -> Wait | GiveUp | None:
        """None where `next` may be asked, after a moment in which the table hears of an end.

        Gives up with Unavailable, WorkersLost or DeadlineExceeded.
        """
        failure = self._failure
        if failure is None:
            return None
        if cluster.now_s < failure.judged_s:
            return self._wait(cluster, failure.judged_s)
        self._failure = None
        self.close()
        error, lost = failure.error, failure.lost
        is_gone = failure.is_prefill and not cluster.is_heard(lost.peer.incarnation)
        if isinstance(error, WorkerLost) or error.sick or is_gone:
            found = self._harm.add(lost, self.membership.num_lost_beside)
            if found is not None:
                self.membership.explain_losses(self._harm.workers)
                return GiveUp(found, tuple(self._harm.workers.values()))
        if self._num_failed >= MAX_ATTEMPTS:
            message = f"{self._num_failed} attempts failed, the last with: {error.message}"
            return GiveUp(Unavailable(message))
        return None


def _is_replaced(model: str, cluster: ClusterView) -> bool:
    """Whether decode workers are ready, but none with this `model_tag`."""
    tags = {model_tag(w) for w in cluster.ready(Role.DECODE)}
    return bool(tags) and model not in tags
