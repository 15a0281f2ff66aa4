"""Routing policies: where one attempt of a request goes, as a pure function of two values.

    ClusterView, RequestView --> Policy --> Plan: a prefill worker or none, a decode worker
                                             '-> None: no decode worker takes the request now

A policy has no clock, no I/O and no state: equal views give equal plans. A cluster may have
hundreds of workers, and a plan is made for each attempt, so a policy reads the rows once or twice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from coordinator.cluster.worker import ClusterView, Worker
from coordinator.routing.affinity import model_tag, sticky
from engine.base.types import Role


@dataclass(frozen=True, slots=True)
class RequestView:
    """What a policy may know of a request; lengths in tokens, workers as incarnations."""

    num_tokens: int  # prompt and output so far
    max_tokens: int = 0  # the longest that prompt and output may become
    computes_alone: bool = False  # the decode worker computes the prompt itself
    model: str = ""  # `model_tag` of what wrote a part of the output; "": nothing is written
    sticky_decode: str = ""  # has the request's blocks, probably
    sticky_prefill: str = ""
    failures: Mapping[str, int] = field(default_factory=dict)  # by incarnation


@dataclass(frozen=True, slots=True)
class Plan:
    """The workers of one attempt; without `prefill` the decode worker computes the prompt."""

    prefill: Worker | None
    decode: Worker

    def __str__(self) -> str:
        """For people: the ids of the workers."""
        decode = self.decode.peer.worker_id
        return f"{decode} with {self.prefill.peer.worker_id}" if self.prefill else decode


# The workers of the next attempt; None where no decode worker takes the request.
Policy = Callable[[ClusterView, RequestView], Plan | None]


def least_loaded(cluster: ClusterView, request: RequestView) -> Plan | None:
    """The worker with the fewest waiting tokens, or the one that has the request's blocks.

    Decode: the sticky worker, else the least loaded one of those with the fewest failures of this
    request. Prefill: after a failure the sticky worker if it had no part in it, else the least
    loaded one that has not failed. A degraded worker comes last for decode and never for prefill,
    for a decode worker can compute the prompt itself.
    """
    decode = _decode(cluster, request)
    if decode is None:
        return None
    return Plan(_prefill(cluster, request, decode.model.block_size), decode)


POLICIES: Mapping[str, Policy] = {"least_loaded": least_loaded}  # by the value of --routing


def _decode(cluster: ClusterView, request: RequestView) -> Worker | None:
    fitting = [
        worker
        for worker in cluster.ready(Role.DECODE)
        if worker.model.max_model_len >= request.max_tokens
        and (not request.model or model_tag(worker) == request.model)
    ]
    failures = request.failures
    for worker in fitting:
        if worker.peer.incarnation == request.sticky_decode:
            return worker
    if failures:
        counts = [failures.get(w.peer.incarnation, 0) for w in fitting]
        fewest = min(counts, default=0)
        fitting = [w for w, count in zip(fitting, counts, strict=True) if count == fewest]
    return least_loaded_of(fitting, cluster.now_s)


def _prefill(cluster: ClusterView, request: RequestView, block_size: int) -> Worker | None:
    # The decode worker computes the last token itself, and only whole blocks travel.
    num_whole = (request.num_tokens - 1) // block_size * block_size
    if request.computes_alone or num_whole <= 0:
        return None
    # The choices of a request go by load at first: they wait for the same prompt, and one
    # stalled worker would stop all of them.
    if request.failures:
        kept = sticky(cluster, Role.PREFILL, request.sticky_prefill, request.failures)
        # It may have been lost with the decode worker, on the same machine.
        if kept and kept.is_heard(cluster.now_s):
            return kept
    candidates = [
        worker
        for worker in cluster.ready(Role.PREFILL)
        if worker.model.max_model_len >= num_whole
        and worker.peer.incarnation not in request.failures
        and not worker.is_degraded(cluster.now_s)
    ]
    return least_loaded_of(candidates, cluster.now_s)


def least_loaded_of(workers: Collection[Worker], now_s: float) -> Worker | None:
    """Fewest prompt tokens waiting, then fewest requests, then the lowest id; degraded last.

    A heartbeat counts the requests of all coordinators, but late; the assigned ones are exact.
    """
    return min(
        workers,
        key=lambda w: (
            w.is_degraded(now_s),
            max(w.load.waiting_tokens, w.assigned_tokens),
            max(w.load.num_running + w.load.num_waiting, w.assigned_requests),
            w.peer.worker_id,
        ),
        default=None,
    )
