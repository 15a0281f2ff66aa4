"""Calls of the frontend: events of several calls as one stream, errors in the client's words.

A call lives as long as its stream is read. Closing the stream cancels it, down to the workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager

from coordinator.api.frontend import Frontend
from coordinator.api.openai.errors import Refused, failure_of
from coordinator.api.values import GenerateRequest
from coordinator.generation.events import Event
from coordinator.generation.fan_in import Merge
from engine.base.errors import DiptychError, Unavailable

AT_ONCE = 64  # calls of one HTTP request at once; further prompts of a list wait
Indexed = tuple[int, Event]  # of which prompt
Names = Callable[[int], Mapping[str, str]]  # fields in the client's words, by prompt


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of the frontend name options as the client does. Raises Refused."""
    try:
        yield
    except DiptychError as error:
        raise Refused(failure_of(error, names)) from error
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task and task.cancelling():
            raise
        raise Refused(failure_of(Unavailable("this server is shutting down"))) from None


async def merged(
    frontend: Frontend, requests: Sequence[GenerateRequest], names: Names, limit_s: float
) -> AsyncGenerator[Indexed, None]:
    """The events of several calls as they come. A failure of one call ends them all.

    `limit_s` bounds each call, also while the stream is not read.
    """
    gate = asyncio.Semaphore(AT_ONCE)

    async def run(index: int, merge: Merge[Indexed]) -> None:
        async with gate:
            with in_words_of(names(index)):
                async with aclosing(frontend.generate(requests[index])) as events:
                    async for event in events:
                        await merge.put((index, event))

    async with Merge[Indexed]() as merge:
        for index in range(len(requests)):
            merge.add(run(index, merge), limit_s)
        async for item in merge:
            yield item
