"""Bounds the bytes of requests in flight over all connections of a process.

In flight are requests that are being received, and large requests that are being served.

    take(size) --room--> received() --> keep(actual size) --> end of the context
        |                   |
        | no room           '-- incomplete after GRACE_S while others wait: its timeout expires
        '-- waits, at most WAIT_S: then Overloaded

From a read on, gRPC buffers a message up to the size limit; before the read a stream buffers its
first 64 KiB. So the read is delayed until there is room.

Order of waiting requests: connections that have sent complete requests, then new ones, then those
on which a request was cut off; within each the newest first, because an old one has probably given
up. After a cut-off the next requests of that connection, and of an address with many cut-offs, have
less time to become complete. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from engine.base.errors import Overloaded

SMALL_BYTES = 64 * 1024  # complete requests up to this size do not count
GRACE_S = 1.0
SHORT_GRACE_S = 0.2  # after cut-offs
WAIT_S = 5.0
_MAX_WAITING = 1024
_RETRY_S = 1.0
_TURN_S = 0.02  # time of one turn of the event loop
_CUT_OFF_COUNTS_S = 60.0  # for which a cut-off counts against its connection and address
_MANY_CUT_OFFS = 16  # of an address, which may be a proxy's
_MAX_PEERS = 4096
_UNLIMITED = 1 << 62


@dataclass(eq=False, slots=True)
class _Waiter:
    size: int
    peer: str
    granted: asyncio.Future[None]


class ReceiveBudget:
    """The bytes of one process; calls `refused` for each request that gets no room."""

    def __init__(
        self, num_bytes: int = _UNLIMITED, refused: Callable[[], None] = lambda: None
    ) -> None:
        self.num_bytes = num_bytes
        self._free = num_bytes
        self._refused = refused
        self._peers = _Peers()
        self._waiting = _WaitQueue(self._peers.rank)
        self._incoming: dict[Lease, None] = {}  # being received: may be cut off
        self._ending = 0  # bytes of those that are cut off and not yet returned
        self._timer: asyncio.TimerHandle | None = None

    @property
    def in_flight(self) -> int:
        """Bytes in use."""
        return self.num_bytes - self._free

    def lease(self, peer: str = "") -> Lease:
        """An empty lease for one request from `peer` (ADDRESS:PORT)."""
        return Lease(self, peer)

    async def _take(self, lease: Lease, size: int) -> None:
        size = min(size, self.num_bytes)  # a larger request gets the whole budget
        if self._waiting or size > self._free:
            await self._wait(size, lease.peer)
        else:
            self._free -= size
        lease.size = size

    async def _wait(self, size: int, peer: str) -> None:
        """Wait for `size` bytes. Raises Overloaded."""
        waiter = _Waiter(size, peer, asyncio.get_running_loop().create_future())
        if dropped := self._waiting.add(waiter):
            dropped.granted.cancel()
        self._make_room()
        try:
            await asyncio.wait((waiter.granted,), timeout=WAIT_S)
        except asyncio.CancelledError:
            if _is_granted(waiter):
                self._give(size)
            raise
        finally:
            self._waiting.discard(waiter)
        if not _is_granted(waiter):
            raise self.overloaded()

    def overloaded(self) -> Overloaded:
        """The error for a request without room; counts it."""
        self._refused()
        return Overloaded(
            f"{self.in_flight} bytes of requests are in flight, of at most {self.num_bytes}"
            " (--max-request-bytes-in-flight)",
            _RETRY_S,
        )

    def _give(self, size: int) -> None:
        self._free += size
        while (waiter := self._waiting.first()) and waiter.size <= self._free:
            self._waiting.discard(waiter)
            self._free -= waiter.size
            waiter.granted.set_result(None)

    def _make_room(self) -> None:
        """Cut off overdue requests, as many as the next waiting one needs."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        if (waiter := self._waiting.first()) is None:
            return
        loop = asyncio.get_running_loop()
        late_s = SHORT_GRACE_S
        while self._free + self._ending < waiter.size:
            oldest = min(self._incoming, key=lambda lease: lease.due_s, default=None)
            if oldest is None:
                break
            if (left_s := oldest.due_s - loop.time()) > 0:
                late_s = left_s
                break
            if not oldest.is_due:  # its message may have arrived while the loop was busy
                oldest.is_due = True
                oldest.due_s = loop.time() + _TURN_S
                continue
            del self._incoming[oldest]
            self._ending += oldest.size
            self._peers.cut_off(oldest.peer)
            oldest.cut_off()
        self._timer = loop.call_later(late_s, self._make_room)


class _WaitQueue:
    """Waiting requests by the rank of their peers; all operations take constant time."""

    def __init__(self, rank: Callable[[str], int]) -> None:
        self._rank = rank
        self._ranks: tuple[dict[_Waiter, None], ...] = ({}, {}, {})  # ascending

    def __bool__(self) -> bool:
        return any(self._ranks)

    def add(self, waiter: _Waiter) -> _Waiter | None:
        """Add a request; returns the one to drop if there are too many."""
        self._ranks[self._rank(waiter.peer)][waiter] = None
        if sum(map(len, self._ranks)) <= _MAX_WAITING:
            return None
        last = next(iter(next(filter(None, self._ranks))))
        self.discard(last)
        return last

    def discard(self, waiter: _Waiter) -> None:
        for waiting in self._ranks:
            waiting.pop(waiter, None)

    def first(self) -> _Waiter | None:
        """The newest request of the highest rank."""
        for i in reversed(range(len(self._ranks))):
            waiting = self._ranks[i]
            while waiting:
                waiter = next(reversed(waiting))
                if (rank := self._rank(waiter.peer)) >= i:
                    return waiter
                del waiting[waiter]  # the rank of its peer has fallen
                self._ranks[rank][waiter] = None
        return None


class _Peers:
    """Recent history of connections and addresses."""

    def __init__(self) -> None:
        self._complete: dict[str, None] = {}  # connections with complete requests, newest last
        self._cut_off: dict[str, tuple[int, float]] = {}  # count, time at which it expires

    def rank(self, peer: str) -> int:
        """0 to 2; higher ranks go first."""
        return 0 if self._num_cut_off(peer) else 1 + (peer in self._complete)

    def grace_s(self, peer: str) -> float:
        """Time that the next request has to become complete while others wait."""
        many = self._num_cut_off(_address(peer)) >= _MANY_CUT_OFFS
        return SHORT_GRACE_S if many or self._num_cut_off(peer) else GRACE_S

    def received(self, peer: str) -> None:
        """Record a complete request."""
        _put(self._complete, peer, None)

    def cut_off(self, peer: str) -> None:
        """Record that a request was cut off."""
        until_s = asyncio.get_running_loop().time() + _CUT_OFF_COUNTS_S
        for name in {peer, _address(peer)} - {""}:
            _put(self._cut_off, name, (self._num_cut_off(name) + 1, until_s))

    def _num_cut_off(self, name: str) -> int:
        count, until_s = self._cut_off.get(name, (0, 0.0))
        return count if count and until_s > asyncio.get_running_loop().time() else 0


def _put(history: dict[str, Any], name: str, value: Any) -> None:
    history.pop(name, None)
    history[name] = value
    if len(history) > _MAX_PEERS:
        del history[next(iter(history))]


def _address(peer: str) -> str:
    return peer.rpartition(":")[0]


class Lease:
    """The bytes that one request holds; leaving the context returns them."""

    __slots__ = ("_budget", "_limit", "due_s", "is_cut_off", "is_due", "peer", "size")

    def __init__(self, budget: ReceiveBudget, peer: str) -> None:
        self._budget = budget
        self.peer = peer
        self._limit: asyncio.Timeout | None = None
        self.size = 0
        self.due_s = 0.0  # loop time from which it may be cut off
        self.is_due = self.is_cut_off = False

    async def take(self, size: int, limit: asyncio.Timeout, grace_s: float | None = None) -> None:
        """Wait for room to receive `size` bytes. Raises Overloaded.

        If others need the room and the request is incomplete after `grace_s`, `is_cut_off` is set
        and `limit` expires. The caller calls `received` before it leaves `limit`.
        """
        await self._budget._take(self, size)
        self._limit, self.is_due = limit, False
        if grace_s is None:
            grace_s = self._budget._peers.grace_s(self.peer)
        self.due_s = asyncio.get_running_loop().time() + grace_s
        self._budget._incoming[self] = None

    def received(self) -> None:
        """Record that the request is complete; it is not cut off any more."""
        self._budget._incoming.pop(self, None)
        self._limit = None
        if self.is_cut_off:
            self._budget._ending -= self.size
            self.is_cut_off = False

    def keep(self, size: int) -> None:
        """Reduce the lease to `size` bytes; a small request holds none. 0: it has ended."""
        if size and self.peer:
            self._budget._peers.received(self.peer)
        size = min(size, self.size) if size > SMALL_BYTES else 0
        self.received()
        returned, self.size = self.size - size, size
        self._budget._give(returned)

    def cut_off(self) -> None:
        """Stop the reader, because others need the room."""
        self.is_cut_off = True
        assert self._limit is not None, "only a request that is being received is cut off"
        self._limit.reschedule(asyncio.get_running_loop().time())

    def refusal(self) -> Overloaded:
        """The error for a request that `is_cut_off`."""
        error = self._budget.overloaded()
        return Overloaded(f"not complete in time: {error.message}", error.retry_after_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.keep(0)


def _is_granted(waiter: _Waiter) -> bool:
    return waiter.granted.done() and not waiter.granted.cancelled()
