"""Where a step's time goes, phase by phase."""

from __future__ import annotations

from collections.abc import Callable


class Stopwatch:
    """Laps by name, in seconds; a name may come again and adds up."""

    __slots__ = ("_clock", "_last_s", "laps")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last_s = clock()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What passed since the last lap belongs to `name`."""
        now_s = self._clock()
        self.laps[name] = self.laps.get(name, 0.0) + now_s - self._last_s
        self._last_s = now_s
