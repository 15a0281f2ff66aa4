"""Bytes of requests in flight over all connections of a process: what is being received, and large
requests that are being served.

    take(size) --room--> received --> keep(its own size) --> close()
        |                   ^ |
        | no room           | '-- not whole after GRACE_S while others wait: its limit expires
        '-- waits, at most WAIT_S: then Overloaded

gRPC hands out whole messages and holds what it has of one, up to the limit of a message, from the
moment it is asked for; before that a stream holds its first 64 KiB. So the asking waits.

Order: connections that have brought whole requests, then new ones, and last those on
which a request had to be ended; then the newest, for one that has waited long is likely to have
given up. Where requests had to be ended, the next ones of that connection, and of an address with
many, have less time to become whole. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from engine.base.errors import Overloaded

SMALL_BYTES = 64 * 1024  # of a request: not counted once it is whole
GRACE_S = 1.0
SHORT_GRACE_S = 0.2  # where earlier ones were ended
WAIT_S = 5.0
_MAX_WAITING = 1024
_RETRY_S = 1.0
_TURN_S = 0.02  # of the event loop
_ENDED_MEANT_S = 60.0  # for which the end of a request counts against its connection and address
_MANY_ENDED = 16  # of an address, which may be a proxy's
_MAX_PEERS = 4096
_UNLIMITED = 1 << 62


@dataclass(eq=False, slots=True)
class _Waiter:
    size: int
    peer: str
    granted: asyncio.Future[None]


class ReceiveBudget:
    """The bytes of one process; `refused` is called for each request that found no room."""

    def __init__(
        self, num_bytes: int = _UNLIMITED, refused: Callable[[], None] = lambda: None
    ) -> None:
        self.num_bytes = num_bytes
        self._free = num_bytes
        self._refused = refused
        self._peers = _Peers()
        self._waiting = _Line(self._peers.rank)
        self._incoming: dict[Lease, None] = {}  # may be ended for others
        self._ending = 0  # bytes of those that were ended and have not given theirs back
        self._timer: asyncio.TimerHandle | None = None

    @property
    def in_flight(self) -> int:
        """Bytes that are taken."""
        return self.num_bytes - self._free

    def lease(self, peer: str = "") -> Lease:
        """A share of one request, with nothing taken yet; `peer`: ADDRESS:PORT it comes from."""
        return Lease(self, peer)

    async def _take(self, lease: Lease, size: int) -> None:
        size = min(size, self.num_bytes)  # what is larger than all comes alone
        if self._waiting or size > self._free:
            await self._wait(size, lease.peer)
        else:
            self._free -= size
        lease.size = size

    async def _wait(self, size: int, peer: str) -> None:
        """Until `size` bytes are ours. Raises Overloaded."""
        waiter = _Waiter(size, peer, asyncio.get_running_loop().create_future())
        if last := self._waiting.add(waiter):
            last.granted.cancel()
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
        """The error of a request for which there is no room; it is counted."""
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
        """End what was to be whole long ago, as far as the next that waits needs it."""
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
            if not oldest.is_due:  # its message may be here, if the loop was busy
                oldest.is_due = True
                oldest.due_s = loop.time() + _TURN_S
                continue
            del self._incoming[oldest]
            self._ending += oldest.size
            self._peers.ended(oldest.peer)
            oldest.end()
        self._timer = loop.call_later(late_s, self._make_room)


class _Line:
    """Those that wait, by the rank of their peers; all of it takes constant time."""

    def __init__(self, rank: Callable[[str], int]) -> None:
        self._rank = rank
        self._ranks: tuple[dict[_Waiter, None], ...] = ({}, {}, {})  # the last goes first

    def __bool__(self) -> bool:
        return any(self._ranks)

    def add(self, waiter: _Waiter) -> _Waiter | None:
        """The one that has to leave because there are too many, if so."""
        self._ranks[self._rank(waiter.peer)][waiter] = None
        if sum(map(len, self._ranks)) <= _MAX_WAITING:
            return None
        last = next(iter(next(filter(None, self._ranks))))
        self.discard(last)
        return last

    def discard(self, waiter: _Waiter) -> None:
        """It waits no longer."""
        for waiting in self._ranks:
            waiting.pop(waiter, None)

    def first(self) -> _Waiter | None:
        """The newest of the highest rank."""
        for i in reversed(range(len(self._ranks))):
            waiting = self._ranks[i]
            while waiting:
                waiter = next(reversed(waiting))
                if (rank := self._rank(waiter.peer)) >= i:
                    return waiter
                del waiting[waiter]  # its peer has lost rank since
                self._ranks[rank][waiter] = None
        return None


class _Peers:
    """How the requests of connections and addresses have ended, the last of them."""

    def __init__(self) -> None:
        self._whole: dict[str, None] = {}  # connections, and the newest is the last
        self._ended: dict[str, tuple[int, float]] = {}  # how many, until when they count

    def rank(self, peer: str) -> int:
        """0 to 2; the higher goes first."""
        return 0 if self._num_ended(peer) else 1 + (peer in self._whole)

    def grace_s(self, peer: str) -> float:
        """What the next request may take to become whole while others wait."""
        many = self._num_ended(_address(peer)) >= _MANY_ENDED
        return SHORT_GRACE_S if many or self._num_ended(peer) else GRACE_S

    def received(self, peer: str) -> None:
        """A whole request has come."""
        _put(self._whole, peer, None)

    def ended(self, peer: str) -> None:
        """A request was ended, for it was not whole and others waited."""
        until_s = asyncio.get_running_loop().time() + _ENDED_MEANT_S
        for name in {peer, _address(peer)} - {""}:
            _put(self._ended, name, (self._num_ended(name) + 1, until_s))

    def _num_ended(self, name: str) -> int:
        count, until_s = self._ended.get(name, (0, 0.0))
        return count if count and until_s > asyncio.get_running_loop().time() else 0


def _put(known: dict[str, Any], name: str, value: Any) -> None:
    known.pop(name, None)
    known[name] = value
    if len(known) > _MAX_PEERS:
        del known[next(iter(known))]


def _address(peer: str) -> str:
    return peer.rpartition(":")[0]


class Lease:
    """What one request takes of the budget. A context manager: all is given back at its end."""

    __slots__ = ("_budget", "_limit", "due_s", "is_due", "is_ended", "peer", "size")

    def __init__(self, budget: ReceiveBudget, peer: str) -> None:
        self._budget = budget
        self.peer = peer
        self._limit: asyncio.Timeout | None = None
        self.size = 0
        self.due_s = 0.0  # when it may be ended for others, of the loop's clock
        self.is_due = self.is_ended = False

    async def take(self, size: int, limit: asyncio.Timeout, grace_s: float | None = None) -> None:
        """Wait for room to receive `size` bytes.

        `limit` expires if others need the room and they are not received after `grace_s`: then
        `is_ended` is set. `received` has to be called before `limit` is left. Raises Overloaded.
        """
        await self._budget._take(self, size)
        self._limit, self.is_due = limit, False
        if grace_s is None:
            grace_s = self._budget._peers.grace_s(self.peer)
        self.due_s = asyncio.get_running_loop().time() + grace_s
        self._budget._incoming[self] = None

    def received(self) -> None:
        """It is here as a whole, and is not ended for others any longer."""
        self._leave()

    def keep(self, size: int) -> None:
        """It is a request of `size` bytes; few are not counted any longer. 0: it is over."""
        if size and self.peer:
            self._budget._peers.received(self.peer)
        size = min(size, self.size) if size > SMALL_BYTES else 0
        self._leave()
        given, self.size = self.size - size, size
        self._budget._give(given)

    def end(self) -> None:
        """Have the reader stop: others need the room."""
        self.is_ended = True
        assert self._limit is not None, "only what is being received is ended"
        self._limit.reschedule(asyncio.get_running_loop().time())

    def _leave(self) -> None:
        self._budget._incoming.pop(self, None)
        self._limit = None
        if self.is_ended:
            self._budget._ending -= self.size
            self.is_ended = False

    def refusal(self) -> Overloaded:
        """Why the limit expired, where `is_ended`."""
        error = self._budget.overloaded()
        return Overloaded(f"not whole in time: {error.message}", error.retry_after_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.keep(0)


def _is_granted(waiter: _Waiter) -> bool:
    return waiter.granted.done() and not waiter.granted.cancelled()
