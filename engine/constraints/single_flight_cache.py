"""An LRU cache whose values are computed once, however many callers wait for them."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from operator import gt
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")


@dataclass(slots=True)
class _InFlight(Generic[_T]):
    task: asyncio.Task[_T]
    num_waiting: int = 0


class SingleFlightCache(Generic[_T]):
    """Values by key. Evicts while the sum of any component of `cost` exceeds `max_costs`."""

    def __init__(
        self, cost: Callable[[_T], tuple[float, ...]], max_costs: tuple[float, ...], max_values: int
    ) -> None:
        self._cost, self._max_costs, self._max_values = cost, max_costs, max_values
        self._values: OrderedDict[bytes, _T] = OrderedDict()
        self._in_flight: dict[bytes, _InFlight[_T]] = {}
        self.costs = [0.0] * len(max_costs)
        self.num_computed = 0

    def __len__(self) -> int:
        return len(self._values)

    async def get(self, key: bytes, make: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        """The value of `key`; `make` is cancelled when no caller waits for it any more."""
        if key in self._values:
            self._values.move_to_end(key)
            return self._values[key]
        in_flight = self._in_flight.get(key)
        if in_flight is None:
            task = asyncio.create_task(make())
            in_flight = self._in_flight[key] = _InFlight(task)
            task.add_done_callback(partial(self._keep, key, in_flight))
        in_flight.num_waiting += 1
        try:
            return await asyncio.shield(in_flight.task)
        finally:
            in_flight.num_waiting -= 1
            if not in_flight.num_waiting and not in_flight.task.done():
                self._remove_in_flight(key, in_flight)
                in_flight.task.cancel()

    def drop(self, key: bytes) -> None:
        """Remove the value of `key`."""
        if (value := self._values.pop(key, None)) is not None:
            self.costs = [a - b for a, b in zip(self.costs, self._cost(value), strict=True)]

    def _keep(self, key: bytes, in_flight: _InFlight[_T], task: asyncio.Task[_T]) -> None:
        self._remove_in_flight(key, in_flight)
        if task.cancelled() or task.exception() is not None:
            return
        self.num_computed += 1
        value = self._values[key] = task.result()
        self.costs = [a + b for a, b in zip(self.costs, self._cost(value), strict=True)]
        while len(self._values) > (1 if self._is_costly() else self._max_values):
            self.drop(next(iter(self._values)))

    def _is_costly(self) -> bool:
        return any(map(gt, self.costs, self._max_costs))

    def _remove_in_flight(self, key: bytes, in_flight: _InFlight[_T]) -> None:
        if self._in_flight.get(key) is in_flight:
            del self._in_flight[key]
