"""Calls that are open and bring nothing: their coordinator hangs, whatever its connection answers.

    message   tick tick tick ... tick    the call is cancelled, and counts as lost
              |<---- its limit ---->|

Silence is counted in ticks, not read off a clock: a client whose own process stood still counts one
tick, however long that took. What its caller takes for an event is not counted either.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TICKS = 10  # in the shortest limit
_IDLE_TICKS = 40  # for which the thread stays without a call


class Silence:
    """Of one call, which it cancels once. Ticked from any thread."""

    def __init__(self, call: Any, num_ticks: float) -> None:
        self.waiting = True  # for the coordinator, not for the caller
        self.over = False
        self._call = call
        self._num_ticks = num_ticks
        self._num_silent = 0

    def heard(self) -> None:
        """A message has come."""
        self._num_silent = 0

    def tick(self) -> None:
        """Some time has gone by."""
        if self.over or not self.waiting:
            return
        self._num_silent += 1
        if self._num_silent >= self._num_ticks:
            self.over = True
            self._call.cancel()


class Ticks:
    """Where the calls of one client are counted; `shortest_s` is the shortest limit of theirs."""

    def __init__(self, shortest_s: float) -> None:
        self._tick_s = shortest_s / _TICKS
        self._open: set[Silence] = set()
        self._lock = threading.Lock()
        self._running = False

    @contextmanager
    def by_thread(self, call: Any, limit_s: float) -> Iterator[Silence]:
        """While a blocking call is open; one thread serves all of them."""
        silence = self._of(call, limit_s)
        if math.isinf(self._tick_s):
            yield silence
            return
        with self._lock:
            self._open.add(silence)
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="diptych-silence", daemon=True).start()
        try:
            yield silence
        finally:
            with self._lock:
                self._open.discard(silence)

    @contextmanager
    def by_loop(self, call: Any, limit_s: float) -> Iterator[Silence]:
        """While a call of this event loop is open."""
        silence = self._of(call, limit_s)
        if math.isinf(self._tick_s):
            yield silence
            return
        loop = asyncio.get_running_loop()
        timers: list[asyncio.TimerHandle] = []

        def tick() -> None:
            timers[:] = [loop.call_later(self._tick_s, tick)]
            silence.tick()

        timers += [loop.call_later(self._tick_s, tick)]
        try:
            yield silence
        finally:
            timers[0].cancel()

    def _of(self, call: Any, limit_s: float) -> Silence:
        ticks = math.inf if math.isinf(limit_s) else round(limit_s / self._tick_s)
        return Silence(call, ticks)

    def _run(self) -> None:
        num_idle = 0
        while True:
            time.sleep(self._tick_s)
            with self._lock:
                open_now = list(self._open)
                num_idle = 0 if open_now else num_idle + 1
                if num_idle > _IDLE_TICKS:
                    self._running = False
                    return
            for silence in open_now:
                silence.tick()
