"""The windows of a measurement: gaps between tokens, undisturbed and under attack."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from tests.faults.isolation.latency_probe import LatencyProbe
from tests.support.process_tree import foreign_cpu_s

RATIO = 2.0
SLACK_S = 0.010
MOST_FOREIGN = 0.3  # cores that other programs may take in a window that counts


@dataclass(frozen=True, slots=True)
class Windows:
    """How long a measurement is."""

    num_rounds: int
    quiet_s: float
    attack_s: float
    # No further round after so much time under attack: one pass of a group of long attacks has more
    # gaps than all rounds of a short one.
    enough_s: float = math.inf


FULL = Windows(num_rounds=3, quiet_s=2.5, attack_s=4.0)
SHORT = Windows(num_rounds=2, quiet_s=1.5, attack_s=2.0, enough_s=8.0)


class Window:
    """Gaps between the probe's messages while a block runs, and for `seconds` at least."""

    def __init__(self, probe: LatencyProbe, seconds: float) -> None:
        self._probe = probe
        self._begun_s = time.monotonic()
        self._until_s = self._begun_s + seconds
        self._foreign_s = foreign_cpu_s()
        self.gaps: list[float] = []
        self.seconds = 0.0
        self.foreign = 0.0  # cores that other programs took

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            time.sleep(max(0.0, self._until_s - time.monotonic()))
            now_s = time.monotonic()
            self.seconds = now_s - self._begun_s
            self.foreign = (foreign_cpu_s() - self._foreign_s) / self.seconds
            self.gaps = [
                min(gap.end_s, now_s) - gap.begin_s
                for gap in self._probe.gaps()
                if gap.overlaps(self._begun_s, now_s)
            ]

    @property
    def is_over(self) -> bool:
        """Whether so much time has passed."""
        return time.monotonic() >= self._until_s

    @property
    def p99(self) -> float:
        """The gap that one in a hundred is longer than, s."""
        found = sorted(self.gaps)
        return found[min(len(found) - 1, int(0.99 * len(found)))] if found else float("inf")


@dataclass
class Measured:
    """One measurement of one scenario."""

    quiet: list[Window] = field(default_factory=list)
    attack: list[Window] = field(default_factory=list)

    @property
    def quiet_p99(self) -> float:
        """The median of the undisturbed windows, s."""
        return _median_p99(self.quiet)

    @property
    def attack_p99(self) -> float:
        """The same under attack."""
        return _median_p99(self.attack)

    @property
    def comparable(self) -> bool:
        """Whether the machine was undisturbed in a window of each kind."""
        return any(map(_undisturbed, self.quiet)) and any(map(_undisturbed, self.attack))

    @property
    def in_bounds(self) -> bool:
        """Whether the ratio is met, as far as it can be measured."""
        return not self.comparable or self.attack_p99 <= RATIO * self.quiet_p99 + SLACK_S

    def __str__(self) -> str:
        def listed(windows: Sequence[Window]) -> str:
            return ", ".join(f"{1000 * w.p99:.0f}{'' if _undisturbed(w) else '*'}" for w in windows)

        return (
            f"p99 {1000 * self.quiet_p99:.0f} -> {1000 * self.attack_p99:.0f} ms, ratio"
            f" {self.attack_p99 / self.quiet_p99:.2f} (quiet {listed(self.quiet)};"
            f" attacked {listed(self.attack)}; {sum(len(w.gaps) for w in self.attack)} gaps)"
            + ("" if self.comparable else "; not compared: other programs took the cores (*)")
        )


def _undisturbed(window: Window) -> bool:
    return window.foreign <= MOST_FOREIGN


def _median_p99(windows: Sequence[Window]) -> float:
    """The median p99 of the windows on an undisturbed machine, or of all where it never was."""
    return statistics.median(w.p99 for w in [*filter(_undisturbed, windows)] or windows)
