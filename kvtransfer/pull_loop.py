"""The loop of the data-plane thread: every pull in flight, stepped in turn until it settles.

With reads in flight the loop polls, and sleeps longer the longer nothing moves. Where reads that do
not end reach a bound (`quarantine`), it ends the transport and with it every read: pulls that had
failed are settled, all others begin anew under the next agent's name.

Used on the data-plane thread alone, but for `counters`. After `end` the commands only refuse.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from engine.base.holds import Hold
from kvtransfer.connections import Connections
from kvtransfer.fence import Fence
from kvtransfer.links import LinkMeter
from kvtransfer.pull import LocalMemory, Pull, PullRequest, PullResult, Reading
from kvtransfer.quarantine import Quarantine
from kvtransfer.transfer_counters import TransferCounters
from kvtransfer.transport import PeerLost, PullFailed, RemotePool, TransferError

_log = logging.getLogger(__name__)
_END_S = 10.0  # for a transport to end
_POLL_MIN_S = 20e-6
_POLL_MAX_S = 1e-3
_POLL_FAILED_S = 50e-3  # when only failed pulls remain to be settled


@dataclass(slots=True, eq=False)
class PullLoop:
    """All pulls of a data plane. Any thread may read `counters`."""

    connections: Connections
    memory: LocalMemory
    fence: Fence
    quarantine: Quarantine
    meter: LinkMeter
    on_restart: Callable[[], None]
    clock: Callable[[], float]
    counters: TransferCounters = field(default_factory=TransferCounters)  # replaced as a whole
    _readings: list[Reading] = field(default_factory=list)
    _stop_at: float | None = None  # set: no new pulls
    _ended: bool = False

    def serve(self, take_commands: Callable[[float | None], None]) -> None:
        """Run until `begin_stop`. Raises what only the end of the process helps against.

        `take_commands` waits so many seconds for commands and runs them; None: until one comes.
        """
        delay: float | None = None
        while True:
            take_commands(delay)
            now = self.clock()
            if self._stop_at is not None and (not self._readings or now >= self._stop_at):
                return
            moved = self._round(now)
            num_blocks = len(self.memory.landed)
            if reason := self.quarantine.exceeded(self._readings, num_blocks, now):
                self.restart(reason)
            delay = self._next_delay(delay, moved)

    def begin(self, pull: Pull, request: PullRequest) -> None:
        """Take up a pull, or refuse it."""
        if self._stop_at is not None:
            pull.refuse(PullFailed("the data plane has stopped"))
            return
        try:
            peers = self.connections.handles_of(request.pool)
        except PeerLost as error:
            pull.refuse(error)
            return
        if request.local_ids:
            self._readings.append(Reading(pull, request, peers, self.memory, self.fence))
        else:
            pull.done.set_result(PullResult((), 0, 0, 0, 0.0))
            pull.settled.set_result(None)

    def cancel(self, pull: Pull) -> None:
        """Fail a pull; it settles later."""
        for reading in self._readings:
            if reading.pull is pull:
                reading.fail(PullFailed("cancelled"))

    def connect(self, pool: RemotePool, future: Future[None]) -> None:
        """See `DataPlane.connect`."""
        try:
            if self._stop_at is not None:
                raise PullFailed("the data plane has stopped")
            self.connections.connect(pool)
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def disconnect(self, incarnation: str, future: Future[None]) -> None:
        """See `DataPlane.disconnect`; the next round does it."""
        if self._ended:
            future.set_result(None)
        else:
            self.connections.disconnect(incarnation, future)

    def holds(self) -> list[Hold]:
        """What every pull keeps at the moment."""
        now = self.clock()
        return [reading.hold(now, self.quarantine.max_s) for reading in self._readings]

    def begin_stop(self, timeout_s: float) -> None:
        """Fail all pulls; `serve` returns when they have settled, or after `timeout_s`."""
        if self._stop_at is None:
            self._stop_at = self.clock() + timeout_s
            self.fail_all(PullFailed("the data plane is stopping"))

    def fail_all(self, error: TransferError) -> None:
        """Fail every pull in flight."""
        for reading in self._readings:
            reading.fail(error)

    def end(self, *, keep_transport: bool) -> None:
        """Close the transport, unless that is forbidden or a read still holds memory."""
        self._ended = True
        if self._stop_at is None:
            self._stop_at = self.clock()
        if self._readings or keep_transport:
            self.connections.give_up()
        else:
            self.connections.lose_all()
            self.connections.disconnect_idle(set())
            self.connections.end(_END_S)

    def restart(self, reason: str) -> None:
        """End the transport, after which nothing can land, and continue with another.

        Raises AgentStuck, or what opening raises.
        """
        failed = [reading.request.request_id for reading in self._readings if reading.error]
        _log.error("data plane restarts: %s; failed pulls of requests %s", reason, failed)
        self.connections.end(_END_S)
        now = self.clock()
        for reading in self._readings:
            reading.abandon(now)
        self.connections.open()
        self.connections.reconnect()
        for reading in self._readings:
            if reading.is_open:
                try:
                    reading.restart(self.connections.handles_of(reading.request.pool))
                except TransferError as error:
                    reading.fail(error)
                    self._count_failure(reading)
        self.counters = replace(self.counters, num_restarts=self.counters.num_restarts + 1)
        self.on_restart()
        _log.warning("data plane restarted: agent %s", self.connections.agent.name)

    def _next_delay(self, delay: float | None, moved: bool) -> float | None:
        if not self._readings and self._stop_at is None:
            return None
        if moved or not self._readings:
            return 0.0
        if all(reading.error for reading in self._readings):
            return _POLL_FAILED_S
        return min(max(_POLL_MIN_S, (delay or 0.0) * 1.5), _POLL_MAX_S)

    def _round(self, now: float) -> bool:
        """Step every pull once, drop settled ones, disconnect idle peers; whether a pull moved."""
        transport, moved = self.connections.transport, False
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
                result = reading.result
                self.meter.note(reading.request.pool, result.num_bytes, result.seconds, now)
                self.counters = self.counters.with_result(result)
            elif was_open and reading.error:
                self._count_failure(reading)
        self._readings = [reading for reading in self._readings if not reading.settle(now)]
        self.connections.disconnect_idle(self._busy())
        self._publish()
        return moved

    def _busy(self) -> set[str]:
        """Peers whose connection a pull still needs."""
        return {
            reading.request.pool.incarnation
            for reading in self._readings
            if reading.has_reads or reading.error is None
        }

    def _count_failure(self, reading: Reading) -> None:
        """A lost peer is closed with its first failure; its other pulls fail by their own step."""
        self.counters = replace(self.counters, num_failures=self.counters.num_failures + 1)
        if isinstance(reading.error, PeerLost):
            self.connections.lose(reading.request.pool.incarnation)

    def _publish(self) -> None:
        num_in_flight = sum(reading.error is None for reading in self._readings)
        quarantined = sum(reading.num_unsettled_blocks for reading in self._readings)
        c = self.counters
        if (num_in_flight, quarantined) != (c.num_in_flight, c.num_quarantined_blocks):
            self.counters = replace(
                c, num_in_flight=num_in_flight, num_quarantined_blocks=quarantined
            )
