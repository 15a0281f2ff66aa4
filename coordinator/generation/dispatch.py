"""Where the next attempt of a request goes, and whether there is one.

    next() -> Route -> Decode call --tokens--> progressed()
      ^                     |
      |                     +-- lost: D, or its prefill peer
      +------ failed() -----+   counts the attempt, waits a moment

A decode worker is passed over while another has failed less often; one that the table calls ready
may be tried again, and where none is ready the request waits for one to appear. A prefill worker
that failed is done with: the decode worker can do without. One that did not is kept, for it is
likely to have the prompt's blocks. Whoever fails one request is doubted for a while by all
(`Membership.doubt`). A worker that found its own numbers not finite is accused only when another
one has computed what it could not (`Membership.accuse`): a request may be the reason, too.
A request under which one worker after the other is lost is ended (harm.py). An answer that one
model began is not continued by another one, whose workers came when the former's had all gone.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import blake2b

import grpc

from coordinator.cluster.membership import HEARTBEAT_S, Membership, Worker, WorkerState
from coordinator.generation.harmed_workers import HarmedWorkers, Trial
from coordinator.routing.policy import pick, sticky
from engine.base.errors import (
    DeadlineExceeded,
    DiptychError,
    InvalidRequest,
    Mismatch,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    WorkerLost,
)
from engine.base.types import Role
from engine.rpc.status import DETAILS_KEY, from_rpc_error

MAX_ATTEMPTS = 8  # in a row without a new token
_FIRST_BACKOFF_S = 0.05
_MAX_BACKOFF_S = 1.0
_AFFINITY = re.compile(r"[0-9a-f]{16}\.([0-9a-f]{16})")
# What gRPC itself says when a connection or a process goes away in the middle of a call.
_LOST_CODES = (
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.UNIMPLEMENTED,
)


@dataclass(frozen=True, slots=True)
class Route:
    """Who serves an attempt; without `prefill` the decode worker computes the prompt itself."""

    decode: Worker
    prefill: Worker | None

    def __str__(self) -> str:
        """For people: the worker's ids."""
        decode = self.decode.peer.worker_id
        return f"{decode} with {self.prefill.peer.worker_id}" if self.prefill else decode


@dataclass(slots=True)
class Affinity:
    """Who is likely to have a request's blocks: incarnations; "": nobody.

    The choices of a request share one, so that they share the prompt's.
    """

    decode: str = ""
    prefill: str = ""
    model: str = ""  # `_model_tag` of what has written a part of the answer


def affinity_token_of(worker: Worker) -> str:
    """What clients know a worker's process and its model by; it tells nothing else of it."""
    return f"{_tag(worker.peer.incarnation)}.{_model_tag(worker)}"


def _model_tag(worker: Worker) -> str:
    return _tag(worker.model.digest)


def _tag(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()


def affinity_of(membership: Membership, name: str) -> Affinity:
    """The home that a client names, if it may be one; none without a name."""
    found = _AFFINITY.fullmatch(name)
    affinity = Affinity(model=found[1] if found else "")
    workers = membership.snapshot() if found else ()
    for worker in workers:
        if affinity_token_of(worker) == name and sticky(
            workers, Role.DECODE, worker.peer.incarnation
        ):
            affinity.decode = worker.peer.incarnation
    return affinity


class Dispatch:
    """The attempts of one choice of a request."""

    def __init__(
        self,
        membership: Membership,
        *,
        worker_wait_s: float,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
        affinity: Affinity | None = None,
        check_open: Callable[[], None] = lambda: None,
        num_tokens: int = 0,
        trial: Trial | None = None,
    ) -> None:
        """`check_open` raises Unavailable when there are to be no more attempts.

        `num_tokens`: the longest that prompt and answer may become; a decode worker holds as many.
        """
        self._membership = membership
        self._worker_wait_s = worker_wait_s
        self._deadline_s = deadline_s
        self._clock = clock
        self._failures: Counter[str] = Counter()  # by incarnation
        self._affinity = affinity or Affinity()
        self._check_open = check_open
        self._num_tokens = num_tokens
        self._num_failed = 0
        self._route: Route | None = None
        self._suspects: list[tuple[Worker, Worker]] = []  # not finite numbers: whose, found where
        self._harm = HarmedWorkers(membership, trial or Trial(clock))

    def remaining_s(self) -> float:
        """Time until the request's deadline; raises DeadlineExceeded where there is none."""
        left = self._deadline_s - self._clock()
        if left <= 0:
            raise DeadlineExceeded("the request's time ran out")
        return left

    async def next(self, num_tokens: int, *, alone: bool = False) -> Route:
        """The route of the next attempt for `num_tokens` of prompt and answer so far.

        `alone`: the decode worker computes all of it. Waits up to `worker_wait_s` for one. Raises
        Unavailable, DeadlineExceeded; Mismatch where only another model's workers are there.
        """
        decode = await self._decode_worker()
        self._affinity.decode = decode.peer.incarnation
        workers = self._membership.snapshot()
        prefill = None
        # D computes the last token itself, and only whole blocks travel.
        num_whole = (num_tokens - 1) // decode.model.block_size * decode.model.block_size
        if not alone and num_whole > 0:
            prefill = self._sticky_prefill(workers) or pick(
                workers, Role.PREFILL, self._failures, num_whole
            )
            # Choices go by load at first: they wait for one prompt, and one worker could stall all.
            if prefill and (self._failures or not self._affinity.prefill):
                self._affinity.prefill = prefill.peer.incarnation
        self._route = Route(decode, prefill)
        return self._route

    def progressed(self) -> None:
        """New tokens came: earlier failures no longer count."""
        self._num_failed = 0
        if self._route is not None and not self._affinity.model:
            self._affinity.model = _model_tag(self._route.decode)
        if self._suspects and self._route is not None:
            used = {w.peer.incarnation for w in (self._route.decode, self._route.prefill) if w}
            for suspect, witness in self._suspects:
                if suspect.peer.incarnation not in used:
                    self._membership.accuse(suspect, witness)
            self._suspects = []
        self._harm.clear()

    def close(self) -> None:
        """The attempt is over, however it ended."""
        self._harm.end_trial()

    async def failed(self, route: Route, error: Unavailable) -> None:
        """An attempt was lost: returns after a moment if there may be another.

        Raises Unavailable, WorkersLost, DeadlineExceeded.
        """
        lost = route.decode
        if error.lost == Role.PREFILL.value and route.prefill is not None:
            lost = route.prefill
        elif self._affinity.decode == lost.peer.incarnation:
            self._affinity.decode = ""
        self._failures[lost.peer.incarnation] += 1
        self._membership.penalize(lost)
        if error.sick:
            if lost is not route.decode and any(
                w.peer == route.decode.peer for _, w in self._suspects
            ):
                self._failures[route.decode.peer.incarnation] += 1  # it may be the damaged one
                self._affinity.decode = ""
            self._suspects.append((lost, route.decode))
        self._num_failed += 1
        backoff = min(_FIRST_BACKOFF_S * 2 ** (self._num_failed - 1), _MAX_BACKOFF_S)
        await asyncio.sleep(min(backoff, self.remaining_s()))  # the table hears of an end meanwhile
        is_gone = lost is route.prefill and not self._is_heard(lost)
        if isinstance(error, WorkerLost) or error.sick or is_gone:
            self._harm.add(lost)
        else:
            self._harm.end_trial()
        if self._num_failed >= MAX_ATTEMPTS:
            raise Unavailable(f"{self._num_failed} attempts failed, the last with: {error.message}")

    def _sticky_prefill(self, workers: Iterable[Worker]) -> Worker | None:
        """The prefill worker of an earlier attempt, if that was not why it failed, as far as is
        known: who was on the same machine as a decode worker that fell silent is silent as well.
        """
        if not self._failures:
            return None
        kept = sticky(workers, Role.PREFILL, self._affinity.prefill, self._failures)
        return kept if kept and self._is_heard(kept) else None

    def _is_heard(self, worker: Worker) -> bool:
        """Whether it is in the table, and was heard a moment ago."""
        return any(
            row.peer.incarnation == worker.peer.incarnation
            and row.state is not WorkerState.SUSPECT
            and self._clock() - row.heard_s < 2 * HEARTBEAT_S
            for row in self._membership.snapshot()
        )

    def _worse(self, workers: Iterable[Worker]) -> set[str]:
        """Incarnations of decode workers that have failed more often than the best ready one."""
        counts = {
            w.peer.incarnation: self._failures[w.peer.incarnation]
            for w in workers
            if w.role is Role.DECODE
            and w.state is WorkerState.READY
            and w.model.max_model_len >= self._num_tokens
        }
        fewest = min(counts.values(), default=0)
        return {incarnation for incarnation, count in counts.items() if count > fewest}

    async def _decode_worker(self) -> Worker:
        waited_until = self._clock() + self._worker_wait_s
        while True:
            self._check_open()
            workers = self._of_our_model(self._membership.snapshot())
            kept = [w for w in workers if w.peer.incarnation == self._affinity.decode]
            size = self._num_tokens
            found = pick(kept, Role.DECODE, num_tokens=size) or pick(
                workers, Role.DECODE, self._worse(workers), size
            )
            if found and self._harm.may_begin():
                return found
            left = waited_until - self._clock()
            if left <= 0 and found:
                raise Unavailable(
                    "workers were lost under this request, and others are tried first"
                )
            if left <= 0:
                fitting = "" if pick(workers, Role.DECODE) is None else f" for {size} tokens"
                raise Unavailable(
                    f"no decode worker{fitting} is ready (waited {self._worker_wait_s:g} s)",
                    retry_after_s=min(max(self._worker_wait_s, 1.0), 5.0),
                )
            await self._membership.wait_for_change(min(left, self.remaining_s(), 1.0))

    def _of_our_model(self, workers: tuple[Worker, ...]) -> tuple[Worker, ...]:
        """All, unless the answer has begun. Raises Mismatch where the ready ones have another."""
        if not self._affinity.model:
            return workers
        ours = tuple(w for w in workers if _model_tag(w) == self._affinity.model)
        if pick(workers, Role.DECODE) and not pick(ours, Role.DECODE):
            raise Mismatch(
                "the workers' model was replaced after this answer had begun; ask for it anew,"
                " without `resume`"
            )
        return ours


def meaning_of(error: grpc.aio.AioRpcError, *, num_emitted: int) -> DiptychError | None:
    """What a worker's status means for the request: Unavailable is tried again, None is a bug.

    After the first token a full worker is no reason to give up: the next attempt may find room.
    """
    meaning = from_rpc_error(error)
    said = DETAILS_KEY in dict(error.trailing_metadata() or ())  # else gRPC made the status up
    match meaning:
        case Unavailable() if not said:
            return WorkerLost(meaning.message)
        case Unavailable() | InvalidRequest() | DeadlineExceeded():
            return meaning
        case Overloaded():
            return Unavailable(meaning.message) if num_emitted else meaning
        case Mismatch() | Unauthenticated() | PermissionDenied():  # another one may know us
            return Unavailable(meaning.message)
    if error.code() in _LOST_CODES or (error.code() is grpc.StatusCode.INTERNAL and not said):
        return WorkerLost(f"{error.code().name}: {error.details()}")
    return None
