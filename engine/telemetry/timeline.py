"""The life of one request as named events; every latency is a subtraction of two of them.

    coordinator  ARRIVED - ADMITTED - TOKENIZED - ROUTED - TOKENS ... TOKENS - FINISHED
    worker       ARRIVED - SCHEDULED - TOKENS ... TOKENS - FINISHED
                               '- ANNOUNCED ... ANNOUNCED, PULLED ... PULLED, COMMITTED

Of an event that happens many times the first time, the last time and the count are kept, so the
size of a timeline does not depend on the length of the output. Times are of the injected monotonic
clock, which is equal in all processes of one host.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum


class Event(Enum):
    """The events of a request, in their usual order."""

    ARRIVED = "arrived"
    ADMITTED = "admitted"
    TOKENIZED = "tokenized"
    ROUTED = "routed"  # a worker was picked; again after each migration
    SCHEDULED = "scheduled"  # its first row in a step, or the first call for its blocks
    ANNOUNCED = "announced"  # blocks became readable for peers
    PULLED = "pulled"  # a read of blocks ended
    COMMITTED = "committed"  # blocks passed the fence and have their hashes
    TOKENS = "tokens"  # tokens of the output
    FINISHED = "finished"


class Timeline:
    """First time, last time and count of each event. Not thread-safe: it has one owner."""

    __slots__ = ("_clock", "_marks")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._marks: dict[Event, tuple[float, float, int]] = {}

    def mark(self, event: Event, at: float | None = None) -> float:
        """Record that `event` happens now (or happened `at`); returns the time in seconds."""
        moment = self._clock() if at is None else at
        first, _, count = self._marks.get(event, (moment, moment, 0))
        self._marks[event] = (first, moment, count + 1)
        return moment

    def fork(self) -> Timeline:
        """A copy, for a part of the request that continues separately."""
        twin = Timeline(self._clock)
        twin._marks = dict(self._marks)
        return twin

    def first(self, event: Event) -> float | None:
        """The time of the first `event`, or None."""
        mark = self._marks.get(event)
        return mark[0] if mark else None

    def last(self, event: Event) -> float | None:
        """The time of the last `event`, or None."""
        mark = self._marks.get(event)
        return mark[1] if mark else None

    def between(self, start: Event, end: Event) -> float:
        """Seconds from the first `start` to the first `end`; 0.0 if one is missing or later."""
        a, b = self.first(start), self.first(end)
        return max(0.0, b - a) if a is not None and b is not None else 0.0

    def span(self, event: Event) -> float:
        """Seconds from the first to the last `event`."""
        mark = self._marks.get(event)
        return mark[1] - mark[0] if mark else 0.0

    def as_dict(self) -> dict[str, tuple[float, float, int]]:
        """{event: (first, last, count)}, for log lines."""
        return {event.value: mark for event, mark in self._marks.items()}
