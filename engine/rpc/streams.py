"""Time limits of both directions of a stream, and a limit on idle streams.

from the client   first message within `client_timeout_s`, each later one within ten times that,
                  while the call only waits for it (`Incoming`)
to the client     the client reads each message within `client_timeout_s` (`Writer`)
idle              a stream without messages stays open while its connection answers pings; their
                  number is bounded (`IdleStreams`)
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

ALIVE_S = 1.0  # maximum between two messages of a call with `alive` messages
IDLE_TIMES = 10  # limit of later messages, in multiples of the first message's
_PER_CONNECTION = 256  # idle streams of one method; proxies share a connection among clients
_IN_ALL = 4_096
_RETRY_S = 5.0


class CallerGone(Exception):
    """A write failed because the client has gone; the call is cancelled only afterwards."""


class Incoming:
    """The messages of a stream of requests.

    A late message raises DeadlineExceeded; the next iteration waits for it again.
    """

    def __init__(
        self, read: Callable[[], Coroutine[Any, Any, Message | None]], first_s: float
    ) -> None:
        """`read` returns the next message, None at the end."""
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
        """End the pending read."""
        if self._reading:
            self._reading.add_done_callback(_retrieve)
            self._reading.cancel()


class IdleStreams:
    """Counts the open streams of one method that may be idle."""

    def __init__(self, per_connection: int = _PER_CONNECTION, in_all: int = _IN_ALL) -> None:
        self._per_connection = per_connection
        self._in_all = in_all
        self._by_peer: Counter[str] = Counter()

    @contextmanager
    def opened(self, peer: str) -> Iterator[None]:
        """Count one while it is open; `peer` is its connection. Raises Overloaded."""
        for num, limit, where in (
            (self._by_peer[peer], self._per_connection, "on this connection"),
            (self._by_peer.total(), self._in_all, "on this server"),
        ):
            if num >= limit:
                raise Overloaded(f"{limit} streams of this method are open {where}", _RETRY_S)
        self._by_peer[peer] += 1
        try:
            yield
        finally:
            self._by_peer[peer] -= 1
            if not self._by_peer[peer]:
                del self._by_peer[peer]


class Writer:
    """Writes the messages of one call.

    While the client does not read, gRPC accepts no further message or status. The call then ends
    and releases what it holds; the client gets the status when it reads again.
    """

    def __init__(self, context: Context, timeout_s: float) -> None:
        self._context = context
        self._timeout_s = timeout_s
        self._last: asyncio.Future[None] | None = None
        self._alive: Message | None = None
        self._is_silent = False  # no message since the timer was set
        self._timer: asyncio.TimerHandle | None = None

    async def write(self, response: Message) -> None:
        """Send a message. Raises DeadlineExceeded if the client does not read, or CallerGone."""
        self._is_silent = False
        if self._alive is not None and self._last is not None and not self._last.done():
            await self._taken(self._last)
        last = self._last = asyncio.ensure_future(self._context.write(response))
        await self._taken(last)

    def send_alive(self, message: Message | None) -> None:
        """From now on send `message`, if any, each second in which nothing else is sent."""
        if message is not None:
            self._alive = message
            self._timer = asyncio.get_running_loop().call_later(ALIVE_S / 2, self._beat)

    async def finish(self) -> None:
        """Wait for a pending `alive` message, after all others are written."""
        self.close()
        if self._last is not None and not self._last.done():
            await self._taken(self._last)

    def close(self) -> None:
        """Stop the `alive` messages."""
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
        """Wait until the client has taken a message."""
        try:
            done, _ = await asyncio.wait((last,), timeout=self._timeout_s)
        except asyncio.CancelledError:
            last.add_done_callback(_retrieve)
            raise
        if not done:
            raise DeadlineExceeded(f"the client has not read a message for {self._timeout_s:g} s")
        try:
            last.result()
        except grpc.aio.InternalError as error:
            raise CallerGone from error

    async def settle(self) -> None:
        """Wait until no message is pending, at the latest until the connection ends."""
        self.close()
        if self._last is not None and not self._last.done():
            self._last.add_done_callback(_retrieve)
            await asyncio.wait((self._last,))


def _retrieve(write: asyncio.Future[Any]) -> None:
    """Mark a failure as seen, so that asyncio does not log it."""
    if not write.cancelled():
        write.exception()
