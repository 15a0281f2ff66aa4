"""Bytes of requests in flight over all connections of a process: what is being received, and large
requests that are being served.

    take(size) --room--> received --> keep(its own size) --> close()
        |                   ^ |
        | no room           | '-- not whole after GRACE_S while others wait: its limit expires
        '-- waits, the newest first, at most WAIT_S: then Overloaded

gRPC hands out whole messages and holds what it has of one, up to the limit of a message, from the
moment somebody asks for it; before that a stream holds its first 64 KiB. So the asking waits. The
newest goes first: one that has waited long is likely to have given up, and requests that never
become whole do not stand before all others. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from engine.errors import Overloaded

SMALL_BYTES = 64 * 1024  # of a request: not counted once it is whole
GRACE_S = 1.0
WAIT_S = 5.0
_MAX_WAITING = 1024
_RETRY_S = 1.0
_UNLIMITED = 1 << 62


@dataclass(eq=False, slots=True)
class _Waiter:
    size: int
    granted: asyncio.Future[None]


class ReceiveBudget:
    """The bytes of one process; `refused` is called for each request that found no room."""

    def __init__(
        self, num_bytes: int = _UNLIMITED, refused: Callable[[], None] = lambda: None
    ) -> None:
        self.num_bytes = num_bytes
        self._free = num_bytes
        self._refused = refused
        self._waiting: list[_Waiter] = []  # the newest is the last
        self._incoming: dict[Lease, None] = {}  # may be ended for others, oldest first
        self._ending = 0  # bytes of those that were ended and have not given theirs back
        self._timer: asyncio.TimerHandle | None = None

    @property
    def in_flight(self) -> int:
        """Bytes that are taken."""
        return self.num_bytes - self._free

    def lease(self) -> Lease:
        """A share of one request, with nothing taken yet."""
        return Lease(self)

    async def _take(self, lease: Lease, size: int) -> None:
        size = min(size, self.num_bytes)  # what is larger than all comes alone
        if self._waiting or size > self._free:
            await self._wait(size)
        else:
            self._free -= size
        lease.size = size

    async def _wait(self, size: int) -> None:
        """Until `size` bytes are ours. Raises Overloaded."""
        waiter = _Waiter(size, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        if len(self._waiting) > _MAX_WAITING:
            self._waiting.pop(0).granted.cancel()
        self._make_room()
        try:
            await asyncio.wait((waiter.granted,), timeout=WAIT_S)
        except asyncio.CancelledError:
            if _is_granted(waiter):
                self._give(size)
            raise
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
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
        while self._waiting and self._waiting[-1].size <= self._free:
            waiter = self._waiting.pop()
            self._free -= waiter.size
            waiter.granted.set_result(None)

    def _make_room(self) -> None:
        """End what was to be whole long ago, as far as the newest that waits needs it."""
        self._timer = None
        if not self._waiting:
            return
        now_s = asyncio.get_running_loop().time()
        while self._free + self._ending < self._waiting[-1].size:
            oldest = next(iter(self._incoming), None)
            if oldest is None:
                break
            if (left_s := oldest.due_s - now_s) > 0:
                self._timer = asyncio.get_running_loop().call_later(left_s, self._make_room)
                return
            del self._incoming[oldest]
            self._ending += oldest.size
            oldest.end()
        self._timer = asyncio.get_running_loop().call_later(GRACE_S / 4, self._make_room)


class Lease:
    """What one request takes of the budget. A context manager: all is given back at its end."""

    __slots__ = ("_budget", "_limit", "due_s", "is_ended", "size")

    def __init__(self, budget: ReceiveBudget) -> None:
        self._budget = budget
        self._limit: asyncio.Timeout | None = None
        self.size = 0
        self.due_s = 0.0  # when it may be ended for others, of the loop's clock
        self.is_ended = False

    async def take(self, size: int, limit: asyncio.Timeout, grace_s: float = GRACE_S) -> None:
        """Wait for room to receive `size` bytes.

        `limit` expires if others need the room and they are not received after `grace_s`: then
        `is_ended` is set. Raises Overloaded.
        """
        await self._budget._take(self, size)
        self._limit = limit
        self.due_s = asyncio.get_running_loop().time() + grace_s
        self._budget._incoming[self] = None

    def keep(self, size: int) -> None:
        """It is received, and has `size` bytes; few are not counted any longer."""
        size = min(size, self.size) if size > SMALL_BYTES else 0
        self._received()
        given, self.size = self.size - size, size
        self._budget._give(given)

    def end(self) -> None:
        """Have the reader stop: others need the room."""
        self.is_ended = True
        assert self._limit is not None, "only what is being received is ended"
        self._limit.reschedule(asyncio.get_running_loop().time())

    def _received(self) -> None:
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
