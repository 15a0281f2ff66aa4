"""Requests apart from a scenario's fault: cheap, steady, and checked like all others.

begin() -> senders, each: send, read to the end, pause, send again -> end(): all whole, none late
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Sequence

from tests.faults.oracle import CASES, Case, Oracle
from tests.faults.streams import Sender, Stream

CHEAP = tuple(case for name, case in CASES.items() if name.startswith("load-"))


class Load:
    """Background requests in the loop of a test."""

    def __init__(
        self,
        sender: Sender,
        addresses: Callable[[], Sequence[str]],
        oracle: Oracle,
        *,
        num_senders: int = 2,
        pause_s: float = 0.15,
        cases: Sequence[Case] = CHEAP,
        seed: int = 0,
    ) -> None:
        self._sender = sender
        self._addresses = addresses
        self._oracle = oracle
        self._cases = cases
        self._seed = seed
        self._num_senders = num_senders
        self._pause_s = pause_s
        self._ending = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.streams: list[Stream] = []

    def begin(self) -> None:
        """Start to send."""
        self._tasks = [
            asyncio.create_task(self._go_on(random.Random(self._seed * 1000 + i)))
            for i in range(self._num_senders)
        ]

    async def moved(self) -> None:
        """Until nothing is under way any more that was asked before."""
        for stream in list(self.streams):
            await stream.wait_for_end(120)

    async def end(self, longest_wait_s: float) -> None:
        """Let those under way finish; every one is whole, and none waited longer for a token."""
        self._ending.set()
        await asyncio.gather(*self._tasks)
        for stream in self.streams:
            stream.check(self._oracle)
            waited = stream.longest_wait_s()
            assert waited < longest_wait_s, f"{stream} waited {waited:.1f} s for a token"

    async def _go_on(self, rng: random.Random) -> None:
        for i in itertools.count(rng.randrange(100)):
            addresses = self._addresses()
            case = rng.choice(list(self._cases))
            salt = "" if rng.random() < 0.5 else f"load{rng.getrandbits(40)}"
            stream = self._sender.send(addresses[i % len(addresses)], case, salt=salt)
            self.streams.append(stream)
            await stream.wait_for_end(120)
            if self._ending.is_set():
                return
            await asyncio.sleep(self._pause_s * rng.uniform(0.5, 1.5))
