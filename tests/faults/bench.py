"""What scenarios share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass

from tests.faults.clock_skew import ClockSkew
from tests.faults.oracle import Oracle
from tests.support.cluster import Cluster


@dataclass(frozen=True, slots=True)
class Bench:
    """A healthy cluster and what it answers undisturbed."""

    cluster: Cluster
    oracle: Oracle
    skew: ClockSkew | None = None  # its processes' wall clock; None without a C compiler


class SharedBench:
    """One bench for many scenarios. The scenario after a failed one gets a new one.

    get ---> scenario: leaves it complete and at rest ---> get: the same
                '----- fails: discard -------------------> get: another one
    """

    def __init__(self, start: Callable[[], AbstractContextManager[Bench]]) -> None:
        self._start = start
        self._running: Bench | None = None
        self._exits = ExitStack()

    def get(self) -> Bench:
        """The one that runs, or a new one."""
        if self._running is None:
            self._running = self._exits.enter_context(self._start())
        return self._running

    def discard(self) -> None:
        """End the one that runs."""
        self._running = None
        self._exits.close()
