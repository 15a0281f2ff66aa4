"""The data plane: one thread that alone touches the transport, and pulls blocks for everybody else.

    engine thread / asyncio loop              data-plane thread                 transport
       pull(), connect() ...  --commands-->   step every pull in flight  -->    post, poll
                              <--futures---   fence, settle

Other threads only put commands into a queue and hold futures. Idle, the thread sleeps in that
queue; with reads in flight it polls, sleeping longer the longer nothing moves. Futures complete on
the data-plane thread, so their callbacks must be short (`loop.call_soon_threadsafe`, or
`asyncio.wrap_future`).

    serving --reads that do not end reach a bound (`quarantine`)--> restarting --> serving
       |                                                               |
       +-- a bug ---------------> died <-- the transport does not end -+

A restart ends the transport and with it every read; pulls that had failed are settled, the others
begin anew under the next agent's name. The pool, and all who do not pull at that moment, notice
nothing. Who waits on a data plane that died should end the process: only that frees the memory.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np

from engine.base.types import KVLink
from kvtransfer.connections import Connections
from kvtransfer.fence import Fence
from kvtransfer.links import LinkMeter
from kvtransfer.plan import coalesce
from kvtransfer.pull import LocalMemory, Pull, PullHold, PullRequest, PullResult, Reading
from kvtransfer.quarantine import Quarantine
from kvtransfer.transport import (
    GENERATION_BYTES,
    MemoryRegion,
    PeerLost,
    PullFailed,
    RemotePool,
    TransferError,
    Transport,
)

__all__ = ["DataPlane", "Pull", "PullResult", "TransferCounters"]

_log = logging.getLogger(__name__)
_END_S = 10.0  # for a transport to end, in a restart
_POLL_MIN_S = 20e-6
_POLL_MAX_S = 1e-3
_POLL_FAILED_S = 50e-3  # when only failed pulls are left to settle


@dataclass(frozen=True, slots=True)
class TransferCounters:
    """Totals since the start, of pulls that ended; the last two say how it is now."""

    num_pulls: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    num_extents: int = 0
    seconds: float = 0.0  # sum over pulls, which may overlap
    num_stale_blocks: int = 0
    num_failures: int = 0  # pulls that raised
    num_restarts: int = 0  # of the data plane
    num_in_flight: int = 0
    num_quarantined_blocks: int = 0  # destinations of failed pulls that a read may still write


class DataPlane:
    """Owner of the transport and of every read in flight.

    `blocks` is the local pool of num_blocks x block_bytes, `generations` its num_blocks 64-bit
    generations in DRAM; both are registered at `start` and must outlive `stop`. `transport_factory`
    makes a transport for an agent's name. `on_restart` is called on the data-plane thread. Workers
    of one machine have one `machine`.
    """

    def __init__(
        self,
        transport_factory: Callable[[str], Transport],
        *,
        incarnation: str,
        blocks: MemoryRegion,
        generations: MemoryRegion,
        num_blocks: int,
        block_bytes: int,
        fence: Fence | None = None,
        quarantine: Quarantine | None = None,
        on_restart: Callable[[], None] = lambda: None,
        machine: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if blocks.num_bytes < num_blocks * block_bytes:
            raise ValueError(
                f"{blocks.num_bytes} bytes do not hold {num_blocks} blocks of {block_bytes}"
            )
        if (
            generations.num_bytes < num_blocks * GENERATION_BYTES
            or generations.address % GENERATION_BYTES
        ):
            raise ValueError(f"generations: expected {num_blocks} aligned 64-bit integers")
        self.incarnation = incarnation
        self.counters = TransferCounters()  # replaced as a whole; read it from any thread
        self._blocks = blocks
        self._generations = generations
        self._num_blocks = num_blocks
        self._block_bytes = block_bytes
        self._fence = fence or Fence()
        self._quarantine = quarantine or Quarantine()
        self._on_restart = on_restart
        self._machine = machine
        self._meter = LinkMeter(machine, self._lane)
        self._clock = clock
        landed = np.zeros(num_blocks, dtype=np.uint64)
        landing = MemoryRegion(landed.ctypes.data, landed.nbytes)
        self._memory = LocalMemory(blocks, landing, landed)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # orders the last command before the end of the thread
        self._ended = False
        self._stop_at: float | None = None
        self._started: Future[None] = Future()
        self.died: Future[str] = Future()  # why the thread ended by itself: the process should too
        self.died.set_running_or_notify_cancel()
        self._thread = threading.Thread(target=self._run, name="kv-data-plane", daemon=True)
        # Data-plane thread only:
        regions = [blocks, generations, landing]
        self._connections = Connections(transport_factory, incarnation, regions, self._memory)
        self._readings: list[Reading] = []

    # -- any thread --------------------------------------------------------------------------

    def start(self, timeout_s: float = 60.0) -> None:
        """Start the thread and register memory; raises what the transport raised."""
        self._thread.start()
        self._started.result(timeout_s)

    @property
    def local_pool(self) -> RemotePool:
        """This worker's pool as peers see it now; after `start`."""
        agent = self._connections.agent
        return RemotePool(
            incarnation=self.incarnation,
            blocks=self._blocks,
            generations=self._generations,
            num_blocks=self._num_blocks,
            block_bytes=self._block_bytes,
            metadata=agent.metadata,
            agent=agent.name,
            machine=self._machine,
        )

    def links(self) -> dict[str, KVLink]:
        """What reads from each peer have shown, by incarnation."""
        return self._meter.links()

    def _lane(self, pool: RemotePool, same_machine: bool) -> str:
        transport = self._connections.transport
        if transport is None:
            return ""
        return transport.lane(pool.blocks.kind, same_machine=same_machine)

    def connect(self, pool: RemotePool) -> Future[None]:
        """Make a peer's pool readable; repeating it is harmless. PeerLost, PullFailed."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        self._submit(lambda: self._connect(pool, future))
        return future

    def disconnect(self, incarnation: str) -> Future[None]:
        """Take no more pulls from a peer; completes when its last read is over."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        self._submit(lambda: self._disconnect(incarnation, future))
        return future

    def pull(
        self,
        pool: RemotePool,
        remote_ids: Sequence[int],
        local_ids: Sequence[int],
        expected_generations: Sequence[int],
        timeout_s: float,
        request_id: str = "",
    ) -> Pull:
        """Read remote_ids[i] of a connected pool into local_ids[i] and fence it; see `Pull`.

        `request_id` says in logs and holds for whom. ValueError at once for ids out of bounds, a
        local id given twice, lists of unequal length.
        """
        if len(expected_generations) != len(remote_ids):
            raise ValueError(
                f"{len(expected_generations)} generations for {len(remote_ids)} blocks"
            )
        if pool.block_bytes != self._block_bytes:
            raise ValueError(
                f"peer's blocks have {pool.block_bytes} bytes, ours {self._block_bytes}"
            )
        runs = coalesce(
            remote_ids,
            local_ids,
            num_remote_blocks=pool.num_blocks,
            num_local_blocks=self._num_blocks,
        )
        now = self._clock()
        local, expected = tuple(local_ids), tuple(expected_generations)
        request = PullRequest(pool, local, expected, runs, now, now + timeout_s, request_id)
        pull = Pull(local, lambda: self._submit(lambda: self._cancel(pull)))
        self._submit(lambda: self._begin(pull, request))
        return pull

    def holds(self) -> Future[list[PullHold]]:
        """What every pull keeps at the moment, failed ones included."""
        future: Future[list[PullHold]] = Future()
        future.set_running_or_notify_cancel()
        self._submit(lambda: future.set_result(self._holds()))
        return future

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Fail all pulls, wait for their reads, end the thread; whether everything settled in time.

        If not, a peer hangs with our memory in its hands: the transport is left open and the
        process should end without freeing the pool.
        """
        if not self._thread.ident:
            return True
        self._submit(lambda: self._begin_stop(timeout_s))
        self._thread.join(timeout_s + 1.0)
        return not self._thread.is_alive() and self._connections.transport is None

    def _submit(self, command: Callable[[], None]) -> None:
        with self._lock:
            if not self._ended:
                self._commands.put(command)
                return
        command()  # the thread is gone and so its state is ours; every command refuses then

    # -- data-plane thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._connections.open()
        except BaseException as error:
            self._end()
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            self._serve()
        except BaseException as error:
            _log.exception("data plane died")
            for reading in self._readings:
                reading.fail(PullFailed("the data plane died"))
            self.died.set_result(str(error) or repr(error))
        finally:
            self._end()

    def _serve(self) -> None:
        delay: float | None = None  # None: idle, sleep until a command comes
        while True:
            self._take_commands(delay)
            now = self._clock()
            if self._stop_at is not None and (not self._readings or now >= self._stop_at):
                return
            moved = self._round(now)
            if reason := self._quarantine.exceeded(self._readings, self._num_blocks, now):
                self._restart(reason)
            delay = self._next_delay(delay, moved)

    def _restart(self, reason: str) -> None:
        """End the transport, after which nothing can land, and go on with another.

        Raises AgentStuck, or what opening raises: then only the end of the process helps.
        """
        failed = [reading.request.request_id for reading in self._readings if reading.error]
        _log.error("data plane restarts: %s; failed pulls of requests %s", reason, failed)
        self._connections.end(_END_S)
        now = self._clock()
        for reading in self._readings:
            reading.abandon(now)
        self._connections.open()
        self._connections.reconnect()
        for reading in self._readings:
            if reading.is_open:
                try:
                    reading.restart(self._connections.handle_of(reading.request.pool))
                except TransferError as error:
                    reading.fail(error)
                    self._count_failure(reading)
        self.counters = replace(self.counters, num_restarts=self.counters.num_restarts + 1)
        self._on_restart()
        _log.warning("data plane restarted: agent %s", self._connections.agent.name)

    def _take_commands(self, delay: float | None) -> None:
        """Run what has gathered; wait up to `delay` seconds for a first one."""
        try:
            command = self._commands.get() if delay is None else self._commands.get(timeout=delay)
            while True:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _next_delay(self, delay: float | None, moved: bool) -> float | None:
        if not self._readings and self._stop_at is None:
            return None
        if moved or not self._readings:
            return 0.0
        if all(reading.error for reading in self._readings):
            return _POLL_FAILED_S
        return min(max(_POLL_MIN_S, (delay or 0.0) * 1.5), _POLL_MAX_S)

    def _round(self, now: float) -> bool:
        """Step every pull once, drop those that settled, disconnect peers that are done with."""
        transport, moved = self._connections.transport, False
        assert transport is not None, "it is open while this thread serves"
        for reading in self._readings:
            was_open = reading.error is None
            try:
                moved |= reading.step(transport, now)
            except Exception as error:
                request = reading.request
                _log.exception(
                    "pull of request %s from %s broke", request.request_id, request.pool.incarnation
                )
                reading.crash(error, now)
            if reading.result:
                self._count(reading.request.pool, reading.result, now)
            elif was_open and reading.error:
                self._count_failure(reading)
        self._readings = [reading for reading in self._readings if not reading.settle(now)]
        self._connections.disconnect_idle(self._busy())
        self._publish()
        return moved

    def _begin(self, pull: Pull, request: PullRequest) -> None:
        if self._stop_at is not None or self._ended:
            pull.refuse(PullFailed("the data plane has stopped"))
            return
        try:
            peer = self._connections.handle_of(request.pool)
        except PeerLost as error:
            pull.refuse(error)
            return
        if request.local_ids:
            self._readings.append(Reading(pull, request, peer, self._memory, self._fence))
        else:
            pull.done.set_result(PullResult((), 0, 0, 0, 0.0))
            pull.settled.set_result(None)

    def _cancel(self, pull: Pull) -> None:
        for reading in self._readings:
            if reading.pull is pull:
                reading.fail(PullFailed("cancelled"))

    def _connect(self, pool: RemotePool, future: Future[None]) -> None:
        try:
            if self._stop_at is not None or self._ended:
                raise PullFailed("the data plane has stopped")
            self._connections.connect(pool)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _disconnect(self, incarnation: str, future: Future[None]) -> None:
        if self._ended:
            future.set_result(None)
        else:
            self._connections.disconnect(incarnation, future)  # the round that follows does it

    def _busy(self) -> set[str]:
        """Peers whose connection a pull still needs."""
        return {
            reading.request.pool.incarnation
            for reading in self._readings
            if reading.has_reads or reading.error is None
        }

    def _holds(self) -> list[PullHold]:
        now = self._clock()
        return [reading.hold(now, self._quarantine.max_s) for reading in self._readings]

    def _count(self, pool: RemotePool, result: PullResult, now: float) -> None:
        self._meter.note(pool, result.num_bytes, result.seconds, now)
        c = self.counters
        self.counters = replace(
            c,
            num_pulls=c.num_pulls + 1,
            num_blocks=c.num_blocks + result.num_blocks,
            num_bytes=c.num_bytes + result.num_bytes,
            num_extents=c.num_extents + result.num_extents,
            seconds=c.seconds + result.seconds,
            num_stale_blocks=c.num_stale_blocks + len(result.stale),
        )

    def _count_failure(self, reading: Reading) -> None:
        """A lost peer is closed with its first failure; its other pulls fail by their own step."""
        self.counters = replace(self.counters, num_failures=self.counters.num_failures + 1)
        if isinstance(reading.error, PeerLost):
            self._connections.lose(reading.request.pool.incarnation)

    def _publish(self) -> None:
        num_in_flight = sum(reading.error is None for reading in self._readings)
        quarantined = sum(reading.num_unsettled_blocks for reading in self._readings)
        c = self.counters
        if (num_in_flight, quarantined) != (c.num_in_flight, c.num_quarantined_blocks):
            self.counters = replace(
                c, num_in_flight=num_in_flight, num_quarantined_blocks=quarantined
            )

    def _begin_stop(self, timeout_s: float) -> None:
        if self._stop_at is None:
            self._stop_at = self._clock() + timeout_s
            for reading in self._readings:
                reading.fail(PullFailed("the data plane is stopping"))

    def _end(self) -> None:
        """Close the transport unless a read still holds memory, then refuse what comes late."""
        if self._stop_at is None:
            self._stop_at = self._clock()
        try:
            if self._readings or self.died.done():
                self._connections.give_up()
            else:
                self._connections.lose_all()
                self._connections.disconnect_idle(set())
                self._connections.end(_END_S)
        finally:
            with self._lock:
                self._ended = True
            self._take_commands(0.0)
