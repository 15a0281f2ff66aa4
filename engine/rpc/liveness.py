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


async def next_message(call: Any, who: str, silence_s: float = SILENCE_S) -> Any | None:
    """The next message of a server stream (grpc.aio), None at its end.

    Raises Silent, naming `who`, after `silence_s` without one; the call is cancelled then. Raises
    AioRpcError as `call.read` does.
    """
    try:
        async with asyncio.timeout(silence_s):
            message = await call.read()
    except TimeoutError:
        raise Silent(f"{who} has said nothing for {silence_s:g} s") from None
    return None if message is grpc.aio.EOF else message
