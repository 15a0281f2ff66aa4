"""The load of a chaos run: callers that ask, cancel and resume, and believe nothing.

pick a case, a salt, a way -> ask by the client library, which follows all coordinators
    to the end      equal to the oracle, in every token
    cancelled       equal so far
    an error        of a kind that is allowed, or unexplained
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field

from coordinator.client import AsyncClient
from engine.base.errors import Unavailable
from tests.faults.oracle import CASES, Oracle
from tests.faults.streams import Stream, send_by_client
from tests.support.cluster import Cluster

# The only errors that a caller may see: what they are, and why.
ALLOWED = {
    "no worker": "UNAVAILABLE after --worker-wait-s without a decode worker",
}
_SALTS = 6  # shared by some requests, so that prefixes are hit


@dataclass
class Tally:
    """What came of all requests."""

    asked: int = 0
    finished: int = 0
    cancelled: int = 0
    tokens: int = 0
    allowed: Counter[str] = field(default_factory=Counter)
    unexplained: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    waits_s: list[float] = field(default_factory=list)  # longest of each finished request
    ways: Counter[str] = field(default_factory=Counter)


class Callers:
    """So many callers at once; they pause while the cluster is looked at."""

    def __init__(self, cluster: Cluster, oracle: Oracle, seed: int, count: int) -> None:
        self._cluster = cluster
        self._oracle = oracle
        self._rngs = [random.Random(f"{seed}-caller-{i}") for i in range(count)]
        self._seed = seed
        self._running = asyncio.Event()
        self._idle = [asyncio.Event() for _ in range(count)]
        self._tasks: list[asyncio.Task[None]] = []
        self.tally = Tally()

    def start(self) -> None:
        """Begin, paused."""
        self._tasks = [asyncio.create_task(self._call(i)) for i in range(len(self._rngs))]

    def resume(self) -> None:
        """Ask."""
        self._running.set()

    async def pause(self, timeout_s: float) -> None:
        """Ask nothing new, and wait until everything asked has ended."""
        self._running.clear()
        async with asyncio.timeout(timeout_s):
            for idle in self._idle:
                await idle.wait()

    async def stop(self) -> None:
        """End."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _call(self, number: int) -> None:
        rng = self._rngs[number]
        addresses = [self._cluster.address(name) for name in self._cluster.coordinators]
        rng.shuffle(addresses)
        async with AsyncClient(",".join(addresses)) as client:
            while True:
                self._idle[number].set()
                await self._running.wait()
                self._idle[number].clear()
                await self._one(client, rng)
                await asyncio.sleep(rng.uniform(0.0, 0.3))

    async def _one(self, client: AsyncClient, rng: random.Random) -> None:
        tally = self.tally
        case = CASES[rng.choice(sorted(CASES))]
        fresh = rng.random() < 0.6
        salt = f"new{rng.getrandbits(60)}" if fresh else f"old{self._seed}-{rng.randrange(_SALTS)}"
        cancels = rng.random() < 0.2
        tally.asked += 1
        tally.ways["cancel" if cancels else "whole"] += 1
        stream = send_by_client(client, case, salt=salt)
        if cancels:
            await asyncio.wait([_task(stream)], timeout=rng.uniform(0.0, 1.5))
            await stream.cancel()
            if stream.error is None and not stream.done:
                tally.cancelled += 1
                self._compare(stream, whole=False)
                return
        await stream.wait_for_end(180)
        if stream.error is not None:
            self._explain(stream)
            self._compare(stream, whole=False)
            return
        tally.finished += 1
        tally.waits_s.append(stream.longest_wait_s())
        self._compare(stream, whole=True)

    def _compare(self, stream: Stream, *, whole: bool) -> None:
        self.tally.tokens += len(stream.tokens)
        try:
            if whole:
                stream.check(self._oracle)
            else:
                stream.check_so_far(self._oracle)
        except AssertionError as error:
            self.tally.wrong.append(str(error))

    def _explain(self, stream: Stream) -> None:
        error = stream.api_error
        if isinstance(error, Unavailable) and "no decode worker is ready" in error.message:
            self.tally.allowed["no worker"] += 1
        else:
            at = time.strftime("%H:%M:%S")
            self.tally.unexplained.append(f"{at} {stream}: {stream.error!r}")


def _task(stream: Stream) -> asyncio.Task[None]:
    assert stream.task is not None
    return stream.task
