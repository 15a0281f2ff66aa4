"""Silence on a stream means that its other end is lost, whatever the connection looks like.

    callee   message, Alive, Alive, message ...      something at least every BEAT_S
    caller   |<- at most SILENCE_S ->|               then Silent: go elsewhere

A process that was stopped, a link that is cut in one direction, an engine that hangs: none of them
closes a connection, and keepalive takes half a minute. A callee whose engine hangs says nothing, so
that `Alive` vouches for the work and not for the event loop alone.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from engine.errors import Silent

BEAT_S = 0.5
SILENCE_S = 2.5
_LATE_S = 0.25  # a timer that is later than this: the loop was held up
_READ_S = 2 * BEAT_S  # to read what has come meanwhile


async def next_message(call: Any, who: str, silence_s: float = SILENCE_S) -> Any | None:
    """The next message of a server stream (grpc.aio), None at its end.

    Raises Silent, naming `who`, after `silence_s` without one; the call is cancelled then. Time in
    which this event loop did not turn is no silence of its peer: what has come meanwhile is read
    first. Raises AioRpcError as `call.read` does.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def look(due_s: float) -> None:
        nonlocal timer
        now_s = loop.time()
        if now_s - due_s > _LATE_S:
            timer = loop.call_at(now_s + _READ_S, look, now_s + _READ_S)
        else:
            limit.reschedule(now_s)

    due_s = loop.time() + silence_s
    timer = loop.call_at(due_s, look, due_s)
    try:
        async with asyncio.timeout(None) as limit:
            message = await call.read()
    except TimeoutError:
        raise Silent(f"{who} has said nothing for {silence_s:g} s") from None
    finally:
        timer.cancel()
    return None if message is grpc.aio.EOF else message
