"""Several coroutines that run at once, read as one stream.

    add(work) -> each a task: put(item), put(item), ... -> async for item in merge
                                                             |
       leaving the context ends all work that still runs <---+--- ends when all work has ended

`put` waits while the reader is behind. Owned by the task that reads, which also gets the failure of
any work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from engine.base.errors import DeadlineExceeded

Item = TypeVar("Item")

_ROOM = 64  # items that wait for the reader


@dataclass(frozen=True, slots=True)
class _End:
    """A piece of work has ended."""

    error: Exception | None


class Merge(Generic[Item]):
    """The stream; an async context manager that is iterated."""

    def __init__(self, room: int = _ROOM) -> None:
        self._items: asyncio.Queue[Item | _End] = asyncio.Queue()  # `_room` is its bound
        self._room = asyncio.Semaphore(room)
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_open = 0  # pieces that have not ended for the reader

    def add(
        self, work: Coroutine[Any, Any, None], limit_s: float | None = None
    ) -> asyncio.Task[None]:
        """Start `work`; it fails after `limit_s`, also while the reader does not read."""
        self.num_open += 1
        task = asyncio.create_task(self._run(work, limit_s))
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        task.add_done_callback(lambda _: work.close())  # it may never have begun
        return task

    async def put(self, item: Item) -> None:
        """Hand an item to the reader, once there is room."""
        await self._room.acquire()
        self._items.put_nowait(item)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Item:
        while self.num_open:
            item = await self._items.get()
            if not isinstance(item, _End):
                self._room.release()
                return item
            self.num_open -= 1
            if item.error is not None:
                raise item.error
        raise StopAsyncIteration

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, work: Coroutine[Any, Any, None], limit_s: float | None) -> None:
        failure: Exception | None = None
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                await work
        except Exception as error:
            failure = error
            if limit.expired():
                failure = DeadlineExceeded(f"the request took longer than {limit_s:g} s")
        self._items.put_nowait(_End(failure))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if task.cancelled():  # from outside: the reader is not to wait for it
            self._items.put_nowait(_End(None))
