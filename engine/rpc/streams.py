"""The two directions of a stream, and how many streams there may be in which nothing is sent.

from the caller   the first message within `client_timeout_s`, each later one within ten times
                  that, while the call only waits for it (`Incoming`)
to the caller     each message is taken within `client_timeout_s` (`Writer`)
neither           a caller that watches and hears nothing: as long as its connection answers
                  pings, within a bound on their number (`KeptStreams`)
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf.message import Message

from engine.base.errors import DeadlineExceeded, Overloaded

Context = grpc.aio.ServicerContext[Any, Any]

ALIVE_S = 1.0  # at most between two messages of a call that asks for them
IDLE_TIMES = 10  # a stream's idle time, in times of what a first message may take
_PER_CONNECTION = 256  # kept streams of one method; proxies put many callers on a connection
_IN_ALL = 4_096
_RETRY_S = 5.0


class CallerGone(Exception):
    """A message could not be written: gRPC knows that before the call says that it is cancelled."""


class Incoming:
    """The messages of a call with a stream of requests.

    One that does not come in time raises DeadlineExceeded; it may be waited for again.
    """

    def __init__(
        self, read: Callable[[], Coroutine[Any, Any, Message | None]], first_s: float
    ) -> None:
        """`read` gives the next message, None at the end."""
        self._read = read
        self._limit_s = self._first_s = first_s
        self._reading: asyncio.Task[Message | None] | None = None

    def __aiter__(self) -> Incoming:
        return self

    async def __anext__(self) -> Message:
        reading = self._reading = self._reading or asyncio.create_task(self._read())
        await asyncio.wait((reading,), timeout=self._limit_s)
        if not reading.done():
            raise DeadlineExceeded(f"no message within {self._limit_s:g} s")
        self._reading = None
        if (message := reading.result()) is None:
            raise StopAsyncIteration
        self._limit_s = IDLE_TIMES * self._first_s
        return message

    def close(self) -> None:
        """The call has ended."""
        if self._reading:
            self._reading.add_done_callback(_retrieve)
            self._reading.cancel()


class KeptStreams:
    """The streams of one method that stay open without a message."""

    def __init__(self, per_connection: int = _PER_CONNECTION, in_all: int = _IN_ALL) -> None:
        self._per_connection = per_connection
        self._in_all = in_all
        self._by_peer: Counter[str] = Counter()

    @contextmanager
    def opened(self, peer: str) -> Iterator[None]:
        """While one is open; `peer` is its connection. Raises Overloaded where there are many."""
        for num, most, where in (
            (self._by_peer[peer], self._per_connection, "on this connection"),
            (self._by_peer.total(), self._in_all, "on this server"),
        ):
            if num >= most:
                raise Overloaded(f"{most} streams of this method are open {where}", _RETRY_S)
        self._by_peer[peer] += 1
        try:
            yield
        finally:
            self._by_peer[peer] -= 1
            if not self._by_peer[peer]:
                del self._by_peer[peer]


class Writer:
    """The messages of one call.

    One that its caller does not read stays under way, and before it has gone gRPC takes no other
    word, not even a status: what the call holds is released, and the caller hears why when he reads
    again.
    """

    def __init__(self, context: Context, timeout_s: float) -> None:
        self._context = context
        self._timeout_s = timeout_s
        self._last: asyncio.Future[None] | None = None
        self._alive: Message | None = None
        self._is_silent = False  # since the timer was set
        self._timer: asyncio.TimerHandle | None = None

    async def write(self, response: Message) -> None:
        """Send one. Raises DeadlineExceeded for a caller that does not read, or CallerGone."""
        self._is_silent = False
        if self._alive is not None and self._last is not None and not self._last.done():
            await self._taken(self._last)
        last = self._last = asyncio.ensure_future(self._context.write(response))
        await self._taken(last)

    def send_alive(self, message: Message | None) -> None:
        """Send `message`, if there is one, each second in which nothing else is sent."""
        if message is not None:
            self._alive = message
            self._timer = asyncio.get_running_loop().call_later(ALIVE_S / 2, self._beat)

    async def finish(self) -> None:
        """All has been written: what goes out of it alone is still under way."""
        self.close()
        if self._last is not None and not self._last.done():
            await self._taken(self._last)

    def close(self) -> None:
        """No more `alive`: the call has ended, or is about to."""
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _beat(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(ALIVE_S / 2, self._beat)
        is_due = self._is_silent and (self._last is None or self._last.done())
        if is_due:
            self._last = asyncio.ensure_future(self._context.write(self._alive))
            self._last.add_done_callback(_retrieve)
        self._is_silent = not is_due

    async def _taken(self, last: asyncio.Future[None]) -> None:
        """Until a message has gone to the caller."""
        try:
            done, _ = await asyncio.wait((last,), timeout=self._timeout_s)
        except asyncio.CancelledError:
            last.add_done_callback(_retrieve)
            raise
        if not done:
            raise DeadlineExceeded(f"the caller has not taken a message for {self._timeout_s:g} s")
        try:
            last.result()
        except grpc.aio.InternalError as error:
            raise CallerGone from error

    async def settle(self) -> None:
        """Until nothing is under way: at the latest with the connection."""
        self.close()
        if self._last is not None and not self._last.done():
            self._last.add_done_callback(_retrieve)
            await asyncio.wait((self._last,))


def _retrieve(write: asyncio.Future[Any]) -> None:
    """Its failure no longer matters."""
    if not write.cancelled():
        write.exception()
