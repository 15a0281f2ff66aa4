"""The workers of a coordinator: a table that is rebuilt from their Register streams alone.

                 hello accepted           load reports it
      (unknown) ---------------> READY ----------------> DRAINING
                                  |  ^                    |    |
        stream broken, or silent  v  | a heartbeat again  |    | stream broken: it has ended
                                SUSPECT  <----------------+    |
                                  | after a minute, or a new   |
                                  v incarnation of the place   v
                              (forgotten) <--------------------+

Requests go to READY workers only, and to degraded ones last. A worker is degraded that failed a
request lately, that reports so, or that has a stalled event loop (a thread of it reports that, so
it is not silent). Several proofs of wrong computation make a worker sick (`incidents.py`); all
workers are then informed once, by `on_sick`. An incarnation is refused when another one took its
place.

The service's context is that of the decode worker with the longest one, and a shorter worker gets
only requests that fit it. So a worker that joins never shortens what clients were promised, nor
does one that is lost and may come back. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

from coordinator.cluster.compatibility import ServedIdentity, check_others
from coordinator.cluster.incidents import PENALTY_S, STRIKES, Losses, Strikes
from coordinator.cluster.table import WorkerTable
from coordinator.cluster.worker import HEARTBEAT_S, ClusterView, Hello, Load, Worker, WorkerState
from engine.base.errors import Mismatch
from engine.base.memory import readable_size
from engine.base.types import Health, ModelIdentity, Peer, Role
from engine.rpc.liveness import STALL_S, STUCK_LOOP_S
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from engine.telemetry.log import get_logger

_log = get_logger(__name__)

_MAX_SUPERSEDED = 1024


@dataclass(eq=False)
class Membership:
    """Changes the table as workers come, report and go, and lets requests wait for changes."""

    model_name: str
    vocab_size: int
    metrics: CoordinatorMetrics
    clock: Callable[[], float] = time.monotonic
    tokenizer_digest: str = ""
    _table: WorkerTable = field(default_factory=WorkerTable)
    # Incarnations, oldest first.
    _superseded: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _losses: Losses = field(default_factory=Losses)
    _strikes: Strikes = field(default_factory=Strikes)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    penalty_s: float = PENALTY_S

    def __post_init__(self) -> None:
        self._served = ServedIdentity(self.model_name, self.vocab_size, self.tokenizer_digest)
        self._sessions = itertools.count(1)
        self.on_sick: Callable[[Worker], None] = lambda worker: None

    @property
    def identity(self) -> ModelIdentity | None:
        """What the workers agree on, at the longest context of a decode worker; or None."""
        alive = [w for w in self._table.snapshot() if w.state is not WorkerState.SUSPECT]
        if not alive:
            return None
        longest = max(w.model.max_model_len for w in alive)
        return replace(alive[0].model, max_model_len=self.max_model_len or longest)

    @property
    def max_model_len(self) -> int:
        """The service's context: the longest of a decode worker; 0 where there is none."""
        longest = self.longest
        return longest.model.max_model_len if longest else 0

    @property
    def longest(self) -> Worker | None:
        """The decode worker with the longest context; suspects count until they are forgotten."""
        decode = [w for w in self._table.snapshot() if w.role is Role.DECODE]
        return max(decode, key=lambda w: w.model.max_model_len, default=None)

    def snapshot(self) -> tuple[Worker, ...]:
        """All rows, in order of worker_id."""
        return self.view().workers

    def view(self) -> ClusterView:
        """All rows as of this moment: silent workers are suspect, old suspects forgotten."""
        now = self.clock()
        for worker in self._table.expired(now):
            if worker.state is WorkerState.SUSPECT:
                self._remove(worker)
            else:
                self.lost(worker, f"silent for {now - worker.heard_s:.0f} s")
        return ClusterView(self._table.snapshot(), now)

    def ready(self, role: Role) -> bool:
        """Whether a worker of `role` takes new requests."""
        return bool(self.view().ready(role))

    def register(self, hello: Hello) -> Worker:
        """Accept a worker, in place of an earlier incarnation of it. Raises Mismatch."""
        self._served.check(hello)
        if hello.peer.incarnation in self._superseded:
            raise Mismatch(
                f"another process has taken the place {hello.peer.worker_id} meanwhile; start anew,"
                " and give each worker an id of its own"
            )
        check_others(hello.model, hello.peer.worker_id, self.snapshot())
        before = self.max_model_len
        old = self._table.get(hello.peer.worker_id)
        worker = Worker.of(hello, next(self._sessions), self.clock(), old)
        if old and old.peer.incarnation != worker.peer.incarnation:
            self._supersede(old)
        self._table.put(worker)
        _log.info(
            "worker registered",
            worker=hello.peer.worker_id,
            pool=hello.role.value,
            max_model_len=hello.model.max_model_len,
            kv_pool=readable_size(hello.kv_pool.num_bytes),
        )
        self._compare_lengths(worker, before)
        self._notify()
        return worker

    def _supersede(self, old: Worker) -> None:
        """Another process has taken the place of `old`."""
        if old.state is WorkerState.READY:
            self._losses.add(old.peer.incarnation, self.clock())
        self._strikes.forget(old.peer)
        self._superseded[old.peer.incarnation] = None
        if len(self._superseded) > _MAX_SUPERSEDED:
            self._superseded.popitem(last=False)

    def _compare_lengths(self, worker: Worker, before: int) -> None:
        """Log where a decode worker is shorter than the service's context, or shortens it."""
        service, length = self.max_model_len, worker.model.max_model_len
        if service < before:  # the longest one has come back with less memory
            _log.warning(
                "the context is shorter than before",
                worker=worker.peer.worker_id,
                max_model_len=service,
                before=before,
                limit=worker.kv_pool.limit,
            )
        elif worker.role is Role.DECODE and length < service:
            _log.warning(
                "a decode worker's context is shorter than the service's: it gets only requests"
                " that fit",
                worker=worker.peer.worker_id,
                max_model_len=length,
                service=service,
                limit=worker.kv_pool.limit,
            )

    def heartbeat(self, worker: Worker, load: Load) -> bool:
        """Note the load of a registered worker.

        False: its stream is not valid any more, since another process has taken its place, or
        workers of another model came while it was silent.
        """
        current = self._of_session(worker)
        if current is None:
            return False
        if current.state is WorkerState.SUSPECT:
            try:
                check_others(worker.model, worker.peer.worker_id, self.snapshot())
            except Mismatch as error:
                _log.warning("worker refused", worker=worker.peer.worker_id, reason=error.message)
                return False
        state = WorkerState.DRAINING if load.draining else WorkerState.READY
        if state is not current.state:
            _log.info("worker changed", worker=worker.peer.worker_id, state=state.value)
        now = self.clock()
        self._put(replace(current, load=load, state=state, heard_s=now, beat_s=now))
        if load.health is Health.SICK:
            self._found_sick(worker.peer, "its self-test failed")
        return True

    def stalled(self, worker_id: str, incarnation: str, lag_s: float) -> None:
        """A thread of the worker reports that its event loop has not turned for `lag_s`."""
        current = self._table.get(worker_id)
        if current is None or current.peer.incarnation != incarnation:
            return
        if not STALL_S <= lag_s < STUCK_LOOP_S:
            return
        if self.clock() - lag_s > current.stalled_s:  # it has turned since the last report
            _log.warning("a worker's event loop stalls", worker=worker_id, lag_s=round(lag_s, 1))
            self.metrics.worker_stalled(worker_id)
        self._table.put(replace(current, stalled_s=self.clock()))

    def since_stall_s(self, peer: Peer) -> float:
        """Seconds since the process last reported a stall; infinite where it has not."""
        worker = self._of_process(peer)
        return self.clock() - worker.stalled_s if worker else math.inf

    def left(self, worker: Worker) -> None:
        """The worker's stream ended: a draining worker has ended, any other one is lost."""
        current = self._of_session(worker)
        if current is None:
            return
        if current.state is WorkerState.DRAINING:
            _log.info("worker ended", worker=worker.peer.worker_id)
            self._remove(current)
        else:
            self.lost(worker, "its stream broke")

    def lost(self, worker: Worker, reason: str) -> None:
        """There is no sign of the worker: no request is sent to it from now on."""
        current = self._of_session(worker)
        if current is not None and current.state is not WorkerState.SUSPECT:
            _log.warning("worker lost", worker=worker.peer.worker_id, reason=reason)
            self._losses.add(current.peer.incarnation, self.clock())
            self._put(replace(current, state=WorkerState.SUSPECT, heard_s=self.clock()))

    def penalize(self, worker: Worker) -> None:
        """The worker failed a request: others are preferred for a while."""
        if current := self._of_process(worker.peer):
            self._table.put(replace(current, penalized_until_s=self.clock() + self.penalty_s))

    def accuse(self, worker: Worker, witness: Worker) -> None:
        """What the worker could not compute was computed elsewhere: the request is not the reason.

        `witness`: the decode worker that found the numbers.
        """
        now = self.clock()
        if self._of_process(worker.peer) is None or not self._strikes.is_new(worker.peer, now):
            return
        num_strikes = self._strikes.add(worker.peer, now)
        _log.warning("worker computed wrongly", worker=worker.peer.worker_id, num_times=num_strikes)
        num_charges = 0
        if witness.peer != worker.peer and self._of_process(witness.peer):
            num_charges = self._strikes.charge(witness.peer, now)
        if num_strikes < STRIKES:
            return
        if num_charges <= num_strikes:
            self._found_sick(worker.peer, "others computed what it could not")
            return
        self._strikes.acquit_all()
        self._found_sick(witness.peer, "blocks of several workers were damaged in it alone")

    def _found_sick(self, peer: Peer, reason: str) -> None:
        current = self._table.get(peer.worker_id)
        if current is not None and not current.is_sick:
            _log.error("worker is sick", worker=peer.worker_id, reason=reason)
            self.metrics.worker_sick(peer.worker_id)
            self._table.put(replace(current, is_sick=True))
            self.on_sick(current)

    def num_lost_beside(self, incarnations: Container[str]) -> int:
        """Number of workers lost in the last minute that are not among `incarnations`."""
        return self._losses.num_beside(incarnations, self.clock())

    def explain_losses(self, incarnations: Iterable[str]) -> None:
        """One request was the reason for these losses: they count no more."""
        self._losses.remove(incarnations)

    @contextmanager
    def assigned(self, worker: Worker, num_tokens: int) -> Iterator[None]:
        """While a request of `num_tokens` uncomputed tokens is at `worker`, count it there."""
        self._assign(worker.peer, 1, num_tokens)
        try:
            yield
        finally:
            self._assign(worker.peer, -1, -num_tokens)

    def _assign(self, peer: Peer, num_requests: int, num_tokens: int) -> None:
        if worker := self._of_process(peer):
            requests = worker.assigned_requests + num_requests
            tokens = worker.assigned_tokens + num_tokens
            self._table.put(replace(worker, assigned_requests=requests, assigned_tokens=tokens))

    def last_beat_s(self, worker_id: str, since_s: float) -> float | None:
        """When a process of this place that registered after `since_s` last reported, monotonic.

        None: no such process is in the table.
        """
        worker = self._table.get(worker_id)
        return worker.beat_s if worker and worker.since_s >= since_s else None

    async def wait_for_change(self, timeout_s: float) -> None:
        """Until the state of a worker may have changed, at most `timeout_s`."""
        changed = self._changed
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):  # `wait_for` of 3.11 may swallow a cancel
                await changed.wait()

    def wake(self) -> None:
        """Have all requests that wait for a change look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for(self, role: Role, timeout_s: float, count: int = 1) -> bool:
        """Until `count` workers of `role` are ready; False where `timeout_s` was too short."""
        deadline_s = self.clock() + timeout_s
        while len(self.view().ready(role)) < count:
            if (remaining_s := deadline_s - self.clock()) <= 0:
                return False
            await self.wait_for_change(min(remaining_s, HEARTBEAT_S))
        return True

    def _of_process(self, peer: Peer) -> Worker | None:
        """The row of this process; None where another one has its place."""
        worker = self._table.get(peer.worker_id)
        return worker if worker and worker.peer.incarnation == peer.incarnation else None

    def _of_session(self, worker: Worker) -> Worker | None:
        """The row as it is now, if the stream of `worker` is the current one."""
        current = self._table.get(worker.peer.worker_id)
        return current if current and current.session == worker.session else None

    def _put(self, worker: Worker) -> None:
        """Replace a row; a new state wakes the requests that wait."""
        before = self._table.get(worker.peer.worker_id)
        self._table.put(worker)
        if before is None or before.state is not worker.state:
            self._notify()

    def _remove(self, worker: Worker) -> None:
        self._table.remove(worker.peer.worker_id)
        self._strikes.forget(worker.peer)
        self._notify()

    def _notify(self) -> None:
        self.wake()
        counts = Counter((w.role, w.state) for w in self._table.snapshot())
        for role, state in itertools.product(Role, WorkerState):
            self.metrics.set_workers(role.value, state.value, counts[role, state])
