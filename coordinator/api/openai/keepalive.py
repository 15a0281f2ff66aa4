"""Comment lines that keep a silent stream open, since proxies and clients cut silent ones.

A comment is a line that begins with a colon. Clients of server-sent events ignore it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

COMMENT = ": keep-alive\n\n"


async def kept_alive(
    events: AsyncGenerator[str, None], every_s: float
) -> AsyncGenerator[str, None]:
    """`events`, and a comment whenever nothing has come for `every_s`.

    One task reads the events. It is cancelled when this generator is closed.
    """
    queue: asyncio.Queue[str | Exception | None] = asyncio.Queue(1)

    async def read() -> None:
        try:
            async with aclosing(events):
                async for item in events:
                    await queue.put(item)
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    reader = asyncio.create_task(read())
    try:
        while True:
            try:
                async with asyncio.timeout(every_s):
                    item = await queue.get()
            except TimeoutError:
                yield COMMENT
                continue
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
