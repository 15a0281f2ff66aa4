"""Comment lines that keep a silent stream open: proxies and clients cut off what says nothing.

A comment is a line that begins with a colon; clients of server-sent events pass over it.
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

    The events are read by one task, whose end this one's end is: what is under way is cancelled
    and let go.
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
