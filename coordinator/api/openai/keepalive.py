"""Comment lines that keep a silent stream open, since proxies and clients cut silent ones.

A comment is a line that begins with a colon. Clients of server-sent events ignore it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from coordinator.generation.fan_in import Merge

COMMENT = ": keep-alive\n\n"


async def kept_alive(
    events: AsyncGenerator[str, None], every_s: float
) -> AsyncGenerator[str, None]:
    """`events`, and a comment whenever nothing has come for `every_s`.

    One task reads the events. It is cancelled when this generator is closed.
    """

    async def read() -> None:
        async with aclosing(events):
            async for item in events:
                await merge.put(item)

    async with Merge[str](room=1) as merge:
        merge.add(read())
        while True:
            try:
                async with asyncio.timeout(every_s):
                    item = await anext(merge)
            except TimeoutError:
                item = COMMENT
            except StopAsyncIteration:
                return
            yield item
