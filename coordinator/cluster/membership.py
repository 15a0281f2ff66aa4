"""Who serves: the table of workers, rebuilt from their Register streams alone.

                 hello accepted           load says so
      (unknown) ---------------> READY ----------------> DRAINING
                                  |  ^                    |    |
        stream broken, or silent  v  | a heartbeat again  |    | stream broken: it has ended
                                SUSPECT  <----------------+    |
                                  | after a minute, or a new   |
                                  v incarnation of the place   v
                              (forgotten) <--------------------+

Only READY workers are routed to, those that lately failed a request last of all. A worker is sick
where its own self-test failed, or where requests that it gave up for numbers that were not finite
went on at other workers, several times: then all are told of it (`on_sick`), once. An incarnation
whose place another has taken is refused when it comes back: it was stopped, or cut off, and given
up. A worker whose event loop does not turn reports that from a thread: it is not silent then, but
comes last for new requests. The first worker fixes what all must agree on (digest, numeric
profile, block size, vocabulary); when the last one has gone it may change. How long a request each
can hold depends on its memory. The service's context is that of the decode worker with the longest
one, and a shorter worker gets only requests that fit it (`router.pick`): a worker that joins never
shortens what a client was promised, nor does one that is lost and may come back.
Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from enum import Enum

from engine.base.errors import Mismatch
from engine.base.memory import shown
from engine.base.types import (
    NO_KV_POOL,
    PROTOCOL_VERSION,
    Health,
    KVLink,
    KVPool,
    ModelIdentity,
    Peer,
    Role,
)
from engine.rpc.liveness import STALL_S, STUCK_LOOP_S
from engine.telemetry.log import get_logger
from engine.telemetry.metrics import CoordinatorMetrics

_log = get_logger(__name__)

HEARTBEAT_S = 0.5
SILENCE_S = 3.0  # without a heartbeat: suspect
FORGET_S = 60.0  # a suspect stays in the table, for operators to see
LOST_S = 60.0  # how long a loss is remembered
PENALTY_S = 5.0  # how long a worker that failed a request is avoided
STRIKES = 3  # so many proofs against a worker that tests itself well make it sick,
STRIKES_S = 600.0  # within so long
_MAX_SUPERSEDED = 1024


class WorkerState(Enum):
    """What the coordinator makes of a worker."""

    READY = "ready"
    DRAINING = "draining"
    SUSPECT = "suspect"


@dataclass(frozen=True, slots=True)
class Totals:
    """Counters since the worker started."""

    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    blocks_pulled: int = 0
    bytes_pulled: int = 0
    pull_seconds: float = 0.0
    stale_reads: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker said of itself last."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    held_blocks: int = 0
    total_blocks: int = 0
    quarantined_blocks: int = 0
    draining: bool = False
    health: Health = Health.OK
    links: tuple[KVLink, ...] = ()  # to the peers that it has read from
    totals: Totals = field(default_factory=Totals)


@dataclass(frozen=True, slots=True)
class Hello:
    """How a worker introduces itself."""

    peer: Peer
    role: Role
    http_address: str
    model: ModelIdentity
    protocol_version: int
    kv_pool: KVPool = NO_KV_POOL


@dataclass(frozen=True, slots=True)
class Worker:
    """One row of the table, as of a snapshot."""

    peer: Peer
    role: Role
    http_address: str
    model: ModelIdentity
    state: WorkerState
    load: Load
    session: int  # of its stream: what an older stream still says does not count
    since_s: float  # of this incarnation's registration, monotonic
    heard_s: float  # last sign of life, or when it was lost, monotonic
    # What this coordinator has sent there and not had back: newer than any heartbeat.
    assigned_requests: int = 0
    assigned_tokens: int = 0
    doubted_s: float = -math.inf  # when it last failed a request, monotonic
    degraded: bool = False  # whether that was lately, as of the snapshot
    kv_pool: KVPool = NO_KV_POOL
    strikes: tuple[float, ...] = ()  # when it was proven to compute wrongly, monotonic
    charges: tuple[float, ...] = ()  # strikes of others that this decode worker brought about
    is_sick: bool = False
    beat_s: float = 0.0  # its registration or last heartbeat, monotonic
    stalled_s: float = -math.inf  # when it last reported that its event loop stalls, monotonic


class Membership:
    """The table. `model_name` and `vocab_size` are ours; the rest comes with the workers."""

    def __init__(
        self,
        model_name: str,
        vocab_size: int,
        metrics: CoordinatorMetrics,
        clock: Callable[[], float] = time.monotonic,
        tokenizer_digest: str = "",
    ) -> None:
        self._model_name = model_name
        self._vocab_size = vocab_size
        self._tokenizer_digest = tokenizer_digest
        self._metrics = metrics
        self._clock = clock
        self._workers: dict[str, Worker] = {}  # by worker_id
        self._superseded: OrderedDict[str, None] = OrderedDict()  # incarnations, oldest first
        self._lost_s: OrderedDict[str, float] = OrderedDict()  # incarnations that were lost
        self._changed = asyncio.Event()
        self._sessions = itertools.count(1)
        self.on_sick: Callable[[Worker], None] = lambda worker: None

    @property
    def identity(self) -> ModelIdentity | None:
        """What the workers agree on, at the longest context of a decode worker; or None."""
        alive = [w for w in self._workers.values() if w.state is not WorkerState.SUSPECT]
        if not alive:
            return None
        return replace(alive[0].model, max_model_len=self.max_model_len or _longest(alive))

    @property
    def max_model_len(self) -> int:
        """The service's context: the longest of a decode worker's; 0 where there is none."""
        return self.longest.model.max_model_len if self.longest else 0

    @property
    def longest(self) -> Worker | None:
        """The decode worker with the longest context; suspects count until they are forgotten."""
        holders = [w for w in self._workers.values() if w.role is Role.DECODE]
        return max(holders, key=lambda w: w.model.max_model_len, default=None)

    def snapshot(self) -> tuple[Worker, ...]:
        """All rows, in order of worker_id."""
        self._look_at_the_clock()
        now = self._clock()
        return tuple(
            replace(
                worker,
                degraded=now - worker.doubted_s < PENALTY_S
                or now - worker.heard_s > SILENCE_S  # its event loop stalls
                or worker.load.health is not Health.OK
                or worker.is_sick,
            )
            for _, worker in sorted(self._workers.items())
        )

    def ready(self, role: Role) -> bool:
        """Whether some worker of `role` can be routed to."""
        return any(w.role is role and w.state is WorkerState.READY for w in self.snapshot())

    def register(self, hello: Hello) -> Worker:
        """Accept a worker, in place of an earlier incarnation of it. Raises Mismatch."""
        self._check(hello)
        now = self._clock()
        old = self._workers.get(hello.peer.worker_id)
        worker = Worker(
            hello.peer,
            hello.role,
            hello.http_address,
            hello.model,
            WorkerState.READY,
            Load(),
            session=next(self._sessions),
            since_s=now,
            heard_s=now,
            beat_s=now,
            kv_pool=hello.kv_pool,
        )
        if old and old.peer.incarnation == hello.peer.incarnation:  # the same process dialled again
            worker = replace(
                worker,
                since_s=old.since_s,
                load=old.load,
                assigned_requests=old.assigned_requests,
                assigned_tokens=old.assigned_tokens,
                doubted_s=old.doubted_s,
                strikes=old.strikes,
                charges=old.charges,
                is_sick=old.is_sick,
            )
        elif old:
            if old.state is WorkerState.READY:
                self._note_loss(old)
            self._superseded[old.peer.incarnation] = None
            if len(self._superseded) > _MAX_SUPERSEDED:
                self._superseded.popitem(last=False)
        before = self.max_model_len
        self._workers[hello.peer.worker_id] = worker
        _log.info(
            "worker registered",
            worker=hello.peer.worker_id,
            pool=hello.role.value,
            max_model_len=hello.model.max_model_len,
            kv_pool=shown(hello.kv_pool.num_bytes),
        )
        self._compare_lengths(worker, before)
        self._notify()
        return worker

    def _compare_lengths(self, worker: Worker, before: int) -> None:
        """Log where a decode worker is shorter than the service's context, or shortens it."""
        now, ours = self.max_model_len, worker.model.max_model_len
        if now < before:  # the longest one has come back with less memory
            _log.warning(
                "the context is shorter than before",
                worker=worker.peer.worker_id,
                max_model_len=now,
                before=before,
                limit=worker.kv_pool.limit,
            )
        elif worker.role is Role.DECODE and ours < now:
            _log.warning(
                "a decode worker's context is shorter than the service's: it gets only requests"
                " that fit",
                worker=worker.peer.worker_id,
                max_model_len=ours,
                service=now,
                limit=worker.kv_pool.limit,
            )

    def heartbeat(self, worker: Worker, load: Load) -> bool:
        """Note the load of a registered worker; False: its stream counts no more, as another has
        taken its place, or workers of another model came while it was silent.
        """
        current = self._workers.get(worker.peer.worker_id)
        if current is None or current.session != worker.session:
            return False
        if current.state is WorkerState.SUSPECT:
            try:  # another model may have come meanwhile
                self._check_others(worker.model, worker.peer.worker_id)
            except Mismatch as error:
                _log.warning("worker refused", worker=worker.peer.worker_id, reason=error.message)
                return False
        state = WorkerState.DRAINING if load.draining else WorkerState.READY
        if state is not current.state:
            _log.info("worker changed", worker=worker.peer.worker_id, state=state.value)
        now = self._clock()
        self._put(replace(current, load=load, state=state, heard_s=now, beat_s=now))
        if load.health is Health.SICK:
            self._found_sick(worker.peer, "its self-test failed")
        return True

    def stalled(self, worker_id: str, incarnation: str, lag_s: float) -> None:
        """A thread of the worker reports that its event loop has not turned for `lag_s`."""
        current = self._workers.get(worker_id)
        if current is None or current.peer.incarnation != incarnation:
            return
        if not STALL_S <= lag_s < STUCK_LOOP_S:
            return
        if self._clock() - lag_s > current.stalled_s:  # it has turned since the last report
            _log.warning("a worker's event loop stalls", worker=worker_id, lag_s=round(lag_s, 1))
            self._metrics.worker_stalled(worker_id)
        self._workers[worker_id] = replace(current, stalled_s=self._clock())

    def since_stall_s(self, peer: Peer) -> float:
        """Seconds since the process last reported a stall; infinite where it has not."""
        worker = self._workers.get(peer.worker_id)
        if worker is None or worker.peer.incarnation != peer.incarnation:
            return math.inf
        return self._clock() - worker.stalled_s

    def left(self, worker: Worker) -> None:
        """The worker's stream ended: with a draining worker that was its end, another is lost."""
        current = self._workers.get(worker.peer.worker_id)
        if current is None or current.session != worker.session:
            return
        if current.state is WorkerState.DRAINING:
            _log.info("worker ended", worker=worker.peer.worker_id)
            del self._workers[worker.peer.worker_id]
            self._notify()
        else:
            self.lost(worker, "its stream broke")

    def lost(self, worker: Worker, reason: str) -> None:
        """Nothing is heard of the worker: nobody is sent there from now on."""
        current = self._workers.get(worker.peer.worker_id)
        if current is None or current.session != worker.session:
            return
        if current.state is not WorkerState.SUSPECT:
            _log.warning("worker lost", worker=worker.peer.worker_id, reason=reason)
            self._note_loss(current)
            self._put(replace(current, state=WorkerState.SUSPECT, heard_s=self._clock()))

    def penalize(self, worker: Worker) -> None:
        """The worker failed a request: it is avoided for a while, as far as others are there."""
        current = self._workers.get(worker.peer.worker_id)
        if current and current.peer.incarnation == worker.peer.incarnation:
            self._workers[worker.peer.worker_id] = replace(current, doubted_s=self._clock())

    def accuse(self, worker: Worker, witness: Worker) -> None:
        """What the worker could not compute was computed elsewhere: the request is not the reason.

        One incident counts once, however many requests it had. `witness`: the decode worker that
        found the numbers. The fault may be its own memory's, where blocks land: it is the sick one
        where it had a part in more incidents than the worker that it found.
        """
        current = self._workers.get(worker.peer.worker_id)
        if current is None or current.peer.incarnation != worker.peer.incarnation:
            return
        now = self._clock()
        if current.strikes and now - current.strikes[-1] < PENALTY_S:
            return
        strikes = (*(s for s in current.strikes if now - s < STRIKES_S), now)
        self._workers[worker.peer.worker_id] = replace(current, strikes=strikes)
        _log.warning(
            "worker computed wrongly", worker=worker.peer.worker_id, num_times=len(strikes)
        )
        num_charges = self._charge(witness.peer, now) if witness.peer != worker.peer else 0
        if len(strikes) < STRIKES:
            return
        if num_charges <= len(strikes):
            self._found_sick(worker.peer, "others computed what it could not")
            return
        self._workers = {name: replace(w, strikes=()) for name, w in self._workers.items()}
        self._found_sick(witness.peer, "blocks of several workers were damaged in it alone")

    def _charge(self, peer: Peer, now: float) -> int:
        """Note that a decode worker found another worker's fault; returns how often it has."""
        current = self._workers.get(peer.worker_id)
        if current is None or current.peer.incarnation != peer.incarnation:
            return 0
        charges = (*(s for s in current.charges if now - s < STRIKES_S), now)
        self._workers[peer.worker_id] = replace(current, charges=charges)
        return len(charges)

    def _found_sick(self, peer: Peer, reason: str) -> None:
        current = self._workers[peer.worker_id]
        if not current.is_sick:
            _log.error("worker is sick", worker=peer.worker_id, reason=reason)
            self._metrics.worker_sick(peer.worker_id)
            self._workers[peer.worker_id] = replace(current, is_sick=True)
            self.on_sick(current)

    def num_lost_beside(self, incarnations: Container[str]) -> int:
        """How many workers were lost in the last minute that are not of `incarnations`."""
        since_s = self._clock() - LOST_S
        lately = (i for i, lost_s in self._lost_s.items() if lost_s > since_s)
        return sum(incarnation not in incarnations for incarnation in lately)

    def explain_losses(self, incarnations: Iterable[str]) -> None:
        """A request was found to be the reason: these are counted no more."""
        for incarnation in incarnations:
            self._lost_s.pop(incarnation, None)

    @contextmanager
    def assigned(self, worker: Worker, num_tokens: int) -> Iterator[None]:
        """While a request of `num_tokens` uncomputed tokens is with `worker`, count it there."""
        self._assign(worker.peer, 1, num_tokens)
        try:
            yield
        finally:
            self._assign(worker.peer, -1, -num_tokens)

    def last_beat_s(self, worker_id: str, since_s: float) -> float | None:
        """When a process of this place that registered after `since_s` last reported, monotonic.

        None: there is none in the table.
        """
        worker = self._workers.get(worker_id)
        return worker.beat_s if worker and worker.since_s >= since_s else None

    async def wait_for_change(self, timeout_s: float) -> None:
        """Until the table may have changed, at most `timeout_s`."""
        changed = self._changed
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):  # `wait_for` of 3.11 may swallow a cancel
                await changed.wait()

    def wake(self) -> None:
        """Have all who wait for a change look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for(self, role: Role, timeout_s: float, count: int = 1) -> bool:
        """Until `count` workers of `role` are ready; False where `timeout_s` was too short."""
        deadline = self._clock() + timeout_s
        while True:
            ready = [w for w in self.snapshot() if w.role is role and w.state is WorkerState.READY]
            if len(ready) >= count:
                return True
            if (left := deadline - self._clock()) <= 0:
                return False
            await self.wait_for_change(min(left, HEARTBEAT_S))

    def _check(self, hello: Hello) -> None:
        """Raise Mismatch where this worker and ours would not mean the same by the same block."""
        if hello.protocol_version != PROTOCOL_VERSION:
            raise Mismatch(
                f"protocol version {hello.protocol_version} is not {PROTOCOL_VERSION}, which"
                " this coordinator speaks"
            )
        if hello.peer.incarnation in self._superseded:
            raise Mismatch(
                f"another process has taken the place {hello.peer.worker_id} meanwhile; start anew,"
                " and give each worker an id of its own"
            )
        if hello.model.name != self._model_name:
            raise Mismatch(
                f"model {hello.model.name!r} is not configured here; {self._model_name!r} is"
            )
        if hello.model.vocab_size != self._vocab_size:
            raise Mismatch(
                f"vocab_size {hello.model.vocab_size} is not {self._vocab_size} as this"
                " coordinator's tokenizer has it"
            )
        tokens, ours = hello.model.tokenizer_digest, self._tokenizer_digest
        if tokens and ours and tokens != ours:
            raise Mismatch(
                f"tokenizer_digest {tokens} is not {ours}, which this coordinator's tokenizer has;"
                " start both with the same --model"
            )
        self._check_others(hello.model, hello.peer.worker_id)

    def _check_others(self, model: ModelIdentity, worker_id: str) -> None:
        others = self._others(worker_id)
        if others and _agreed(model) != _agreed(others[0].model):
            raise Mismatch(
                f"{_differences(model, others[0].model)}; the workers of one model must"
                f" agree, and {others[0].peer.worker_id} is here already"
            )

    def _others(self, worker_id: str) -> list[Worker]:
        return [
            w
            for w in self.snapshot()
            if w.peer.worker_id != worker_id and w.state is not WorkerState.SUSPECT
        ]

    def _assign(self, peer: Peer, num_requests: int, num_tokens: int) -> None:
        worker = self._workers.get(peer.worker_id)
        if worker and worker.peer.incarnation == peer.incarnation:
            self._workers[peer.worker_id] = replace(
                worker,
                assigned_requests=worker.assigned_requests + num_requests,
                assigned_tokens=worker.assigned_tokens + num_tokens,
            )

    def _note_loss(self, worker: Worker) -> None:
        self._lost_s[worker.peer.incarnation] = self._clock()
        self._lost_s.move_to_end(worker.peer.incarnation)
        if len(self._lost_s) > _MAX_SUPERSEDED:
            self._lost_s.popitem(last=False)

    def _put(self, worker: Worker) -> None:
        before = self._workers.get(worker.peer.worker_id)
        self._workers[worker.peer.worker_id] = worker
        if before is None or before.state is not worker.state:
            self._notify()

    def _look_at_the_clock(self) -> None:
        """Silent workers become suspect, old suspects are forgotten."""
        now = self._clock()
        for worker in list(self._workers.values()):
            silent_s = now - worker.heard_s
            if worker.state is WorkerState.SUSPECT:
                if silent_s > FORGET_S:
                    del self._workers[worker.peer.worker_id]
                    self._notify()
            elif min(silent_s, now - worker.stalled_s) > SILENCE_S:
                self.lost(worker, f"silent for {silent_s:.0f} s")

    def _notify(self) -> None:
        self.wake()
        for role in Role:
            for state in WorkerState:
                count = sum(w.role is role and w.state is state for w in self._workers.values())
                self._metrics.set_workers(role.value, state.value, count)


def _longest(workers: Iterable[Worker]) -> int:
    return max(w.model.max_model_len for w in workers)


def _agreed(model: ModelIdentity) -> ModelIdentity:
    """What must be the same; the length that fits depends on each worker's memory."""
    return replace(model, max_model_len=0)


def _differences(theirs: ModelIdentity, ours: ModelIdentity) -> str:
    """What differs, each as `name theirs is not ours`; the digest where nothing readable does."""
    unread = ("digest", "max_model_len")
    names: Iterable[str] = (f.name for f in fields(ModelIdentity) if f.name not in unread)
    found = [
        f"{name} {getattr(theirs, name)} is not {getattr(ours, name)}"
        for name in names
        if getattr(theirs, name) != getattr(ours, name)
    ]
    return ", ".join(found or [f"digest {theirs.digest} is not {ours.digest}"])
