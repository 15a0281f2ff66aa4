"""Cancels calls that bring no messages, because their coordinator hangs.

    message   tick tick tick ... tick    the call is cancelled, and counts as lost
              |<------- limit ----->|

Silence is counted in ticks, not by a clock: if the client's process was stopped, that counts as one
tick. Time in which the client's user handles an event does not count.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_TICKS = 10  # of the shortest limit
_IDLE_TICKS = 40  # after which the thread ends if no call is open


class SilenceTimer:
    """Cancels one call after a silence. Any thread may tick it."""

    def __init__(self, call: Any, num_ticks: float) -> None:
        self.is_waiting = True  # for the coordinator, not for the user
        self.is_over = False
        self._call = call
        self._num_ticks = num_ticks
        self._num_silent = 0

    def reset(self) -> None:
        """Record a message."""
        self._num_silent = 0

    def tick(self) -> None:
        """Count one tick, and cancel the call at the limit."""
        if self.is_over or not self.is_waiting:
            return
        self._num_silent += 1
        if self._num_silent >= self._num_ticks:
            self.is_over = True
            self._call.cancel()


class SilenceMonitor:
    """The open calls of one client; `shortest_s` is the shortest limit among them."""

    def __init__(self, shortest_s: float) -> None:
        self._tick_s = shortest_s / _TICKS
        self._open: set[SilenceTimer] = set()
        self._lock = threading.Lock()
        self._running = False

    @contextmanager
    def watch_from_thread(self, call: Any, limit_s: float) -> Iterator[SilenceTimer]:
        """Watch a blocking call while it is open; one thread watches all of them."""
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
    def watch_from_loop(self, call: Any, limit_s: float) -> Iterator[SilenceTimer]:
        """Watch a call of this event loop while it is open."""
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

    def _of(self, call: Any, limit_s: float) -> SilenceTimer:
        silence_monitor = math.inf if math.isinf(limit_s) else round(limit_s / self._tick_s)
        return SilenceTimer(call, silence_monitor)

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
