"""Silence on a stream means that its other end is lost, whatever the connection looks like.

    callee   message, Alive, Alive, message ...      something at least every BEAT_S
    caller   |<- at most SILENCE_S ->|               then Silent: go elsewhere

A process that was stopped, a link that is cut in one direction, an engine that hangs: none of them
closes a connection, and keepalive takes half a minute. A callee whose engine hangs says nothing, so
that `Alive` vouches for the work and not for the event loop alone. A callee whose event loop does
not turn cannot send; a thread of it reports that (stalls.py), and silence is counted from the last
report.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import grpc

from engine.base.errors import Silent

BEAT_S = 0.5
SILENCE_S = 2.5
STALL_S = 1.0  # an event loop that has not turned for so long is reported
# One that has not for longer is stuck and excuses nothing: streams have moved before a supervisor
# replaces the worker (--worker-hang-s, 30 s).
STUCK_LOOP_S = 20.0
_LATE_S = 0.25  # a timer that is later than this: the loop was held up
_READ_S = 2 * BEAT_S  # to read what has come meanwhile


async def next_message(
    call: Any,
    name: str,
    silence_s: float = SILENCE_S,
    since_stall_s: Callable[[], float] = lambda: math.inf,
) -> Any | None:
    """The next message of a server stream (grpc.aio), None at its end.

    Raises Silent, with `name` in its message, after `silence_s` without one; the call is cancelled
    then. Time in which this event loop did not turn is no silence of its peer: what has come
    meanwhile is read first. Nor is time in which the peer's loop did not turn: `since_stall_s`
    gives the seconds since the last report of that. Raises AioRpcError as `call.read` does.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def look(due_s: float) -> None:
        nonlocal timer
        now_s = loop.time()
        next_s = now_s + silence_s - since_stall_s()
        if now_s - due_s > _LATE_S:
            next_s = max(next_s, now_s + _READ_S)
        if next_s > now_s:
            timer = loop.call_at(next_s, look, next_s)
        else:
            limit.reschedule(now_s)

    due_s = loop.time() + silence_s
    timer = loop.call_at(due_s, look, due_s)
    try:
        async with asyncio.timeout(None) as limit:
            message = await call.read()
    except TimeoutError:
        raise Silent(f"{name} has said nothing for {silence_s:g} s") from None
    finally:
        timer.cancel()
    return None if message is grpc.aio.EOF else message
