"""What is made once however many ask for it, and kept: the last used ones, within bounds."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

_T = TypeVar("_T")


@dataclass(slots=True)
class _Making(Generic[_T]):
    task: asyncio.Task[_T]
    num_waiting: int = 0


class Known(Generic[_T]):
    """Values by key. `cost` of a value is compared with `most`, item by item, in sums."""

    def __init__(
        self, cost: Callable[[_T], tuple[float, ...]], most: tuple[float, ...], most_values: int
    ) -> None:
        self._cost, self._most, self._most_values = cost, most, most_values
        self._values: OrderedDict[bytes, _T] = OrderedDict()
        self._making: dict[bytes, _Making[_T]] = {}
        self.costs = [0.0] * len(most)
        self.num_made = 0

    def __len__(self) -> int:
        return len(self._values)

    async def get(self, key: bytes, make: Callable[[], Awaitable[_T]]) -> _T:
        """The value; `make` is cancelled when all that wait for it have gone."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        making = self._making.get(key)
        if making is None:
            task = asyncio.ensure_future(_made(make))
            making = self._making[key] = _Making(task)
            task.add_done_callback(partial(self._keep, key, making))
        making.num_waiting += 1
        try:
            return await asyncio.shield(making.task)
        finally:
            making.num_waiting -= 1
            if not making.num_waiting and not making.task.done():
                self._forget_making(key, making)
                making.task.cancel()

    def drop(self, key: bytes) -> None:
        """Make it anew the next time."""
        if (value := self._values.pop(key, None)) is not None:
            self.costs = [a - b for a, b in zip(self.costs, self._cost(value), strict=True)]

    def _keep(self, key: bytes, making: _Making[_T], task: asyncio.Task[_T]) -> None:
        self._forget_making(key, making)
        if task.cancelled() or task.exception() is not None:
            return
        self.num_made += 1
        value = self._values[key] = task.result()
        self.costs = [a + b for a, b in zip(self.costs, self._cost(value), strict=True)]
        while len(self._values) > self._most_values or (
            len(self._values) > 1
            and any(cost > most for cost, most in zip(self.costs, self._most, strict=True))
        ):
            self.drop(next(iter(self._values)))

    def _forget_making(self, key: bytes, making: _Making[_T]) -> None:
        if self._making.get(key) is making:
            del self._making[key]


async def _made(make: Callable[[], Awaitable[_T]]) -> _T:
    return await make()
