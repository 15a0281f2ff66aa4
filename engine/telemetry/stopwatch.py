"""Measures the phases of a step."""

from __future__ import annotations

from collections.abc import Callable


class Stopwatch:
    """Laps by name, in seconds; repeated laps of a name add up."""

    __slots__ = ("_clock", "_last_s", "laps")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last_s = clock()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`."""
        now_s = self._clock()
        self.laps[name] = self.laps.get(name, 0.0) + now_s - self._last_s
        self._last_s = now_s
