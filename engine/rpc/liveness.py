"""Detects the loss of a stream's peer by silence.

    callee   message, Alive, Alive, message ...      at least one every BEAT_S
    caller   |<- at most SILENCE_S ->|               then Silent: the caller uses another worker

A stopped process, a link that is cut in one direction and an engine that hangs do not close the
connection, and keepalive takes half a minute. A callee whose engine hangs sends no `Alive`, so it
proves progress of the engine, not only of the event loop. A callee whose event loop stalls cannot
send; one of its threads reports the stall (stalls.py), and silence counts from the last report.
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
STALL_S = 1.0  # an event loop that stalls for so long is reported
# After a longer stall, reports no longer count: streams move to other workers before a supervisor
# replaces this one (--worker-hang-s, 30 s).
STUCK_LOOP_S = 20.0
_LATE_S = 0.25  # a timer that fires later than this shows that the loop stalled
_READ_S = 2 * BEAT_S  # time to read the messages that arrived meanwhile


async def next_message(
    call: Any,
    name: str,
    silence_s: float = SILENCE_S,
    since_stall_s: Callable[[], float] = lambda: math.inf,
) -> Any | None:
    """The next message of a server stream (grpc.aio), None at its end.

    Raises Silent, with `name` in its message, after `silence_s` without a message, and cancels the
    call. A stall of this event loop does not count as silence, nor does a stall of the peer's:
    `since_stall_s` returns the seconds since its last report. Raises AioRpcError as `call.read`.
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
        raise Silent(f"{name} has sent nothing for {silence_s:g} s") from None
    finally:
        timer.cancel()
    return None if message is grpc.aio.EOF else message
