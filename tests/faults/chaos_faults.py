"""The faults of a chaos run: one at a time from a seeded RNG, undone by themselves after a while.

kill        kill -9 of a worker; it comes back          freeze   SIGSTOP past the lease, SIGCONT
coordinator kill -9 of one while another is there       cut      one way or both, between any two
drain       by AdminService.DrainWorker or SIGTERM      hurry    SIGTERM twice
"""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from contextlib import suppress

import grpc
import httpx

from engine.pb.diptych.v1 import admin_pb2, admin_pb2_grpc
from engine.rpc.channel import open_channel
from tests.support.cluster import Cluster
from tests.support.process_slots import ProcessSlot
from tests.support.timeouts import LEASE_TTL_S

_WEIGHTS = {"kill": 6, "freeze": 3, "cut": 3, "drain": 2, "hurry": 1, "coordinator": 2}
_BETWEEN_S = (1.5, 5.0)
_CUT_S = (1.0, 8.0)
_DRAIN_S = 60.0
_GONE = (AssertionError, OSError)  # of a `ProcessSlot` after its process has ended


class Faults:
    """Breaks a cluster until told to calm down. Lives in one event loop."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster = cluster
        self._rng = random.Random(f"{seed}-faults")
        self._undoing: set[asyncio.Task[None]] = set()
        self._frozen: set[str] = set()
        self._cuts = 0
        self.count: Counter[str] = Counter()
        self.log: list[tuple[float, str]] = []  # moment and what was done

    async def go_on(self, seconds: float) -> None:
        """Faults for so long, then wait until each has been undone."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(self._rng.uniform(*_BETWEEN_S))
            kinds, weights = zip(*_WEIGHTS.items(), strict=True)
            await self._inject(self._rng.choices(kinds, weights)[0])
        if self._undoing:
            await asyncio.wait(set(self._undoing))

    async def _inject(self, kind: str) -> None:
        if kind == "coordinator":
            await self._kill_coordinator()
            return
        if kind == "cut":
            self._cut()
            return
        name = self._rng.choice(self._cluster.workers)
        place = self._cluster[name]
        if place.process is None or name in self._frozen:
            return
        pid = place.process.pid
        if kind == "kill":
            self._note(f"kill {_role(name)}", name)
            _signal(place, signal.SIGKILL)
        elif kind == "freeze":
            self._note(f"freeze {_role(name)}", name)
            self._frozen.add(name)
            self._later(self._freeze(name, LEASE_TTL_S + self._rng.uniform(0.5, 3.0)))
        elif kind == "hurry":
            self._note(f"SIGTERM twice {_role(name)}", name)
            _signal(place, signal.SIGTERM)
            self._later(self._again(name, pid, self._rng.uniform(0.05, 0.5)))
        elif self._rng.random() < 0.5:
            self._note(f"SIGTERM {_role(name)}", name)
            _signal(place, signal.SIGTERM)
        else:
            self._note(f"drain {_role(name)}", name)
            place.wanted = True
            self._later(self._drain(name))

    async def _kill_coordinator(self) -> None:
        """Never the last one that serves."""
        serving = [c for c in self._cluster.coordinators if await self._serves(c)]
        if len(serving) < 2:
            return
        name = self._rng.choice(serving)
        self._note("kill coordinator", name)
        _signal(self._cluster[name], signal.SIGKILL)

    async def _serves(self, coordinator: str) -> bool:
        url = f"http://{self._cluster.http(coordinator)}/health/ready"
        async with httpx.AsyncClient(timeout=1.0) as client:
            with suppress(httpx.HTTPError):
                return (await client.get(url)).status_code == 200
        return False

    def _cut(self) -> None:
        """Between two that talk to each other; one cut at a time, for healing ends all."""
        if self._cuts:
            return
        pools = [self._cluster.coordinators, self._cluster.prefill, self._cluster.decode]
        one, other = (self._rng.choice(pool) for pool in self._rng.sample(pools, 2))
        both = self._rng.random() < 0.5
        self._note(f"cut {_role(one)}-{_role(other)} {'both' if both else 'one way'}", one, other)
        self._cuts += 1
        self._cluster.network.cut(one, other)
        if both:
            self._cluster.network.cut(other, one)
        self._later(self._heal(self._rng.uniform(*_CUT_S)))

    async def _freeze(self, name: str, for_s: float) -> None:
        with suppress(*_GONE):
            await asyncio.to_thread(self._cluster[name].freeze)
        await asyncio.sleep(for_s)
        with suppress(*_GONE):
            self._cluster[name].thaw()
        self._frozen.discard(name)

    async def _heal(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self._cluster.network.heal()
        self._cuts -= 1

    async def _again(self, name: str, pid: int, after_s: float) -> None:
        await asyncio.sleep(after_s)
        place = self._cluster[name]
        if place.alive and place.pid == pid:
            _signal(place, signal.SIGTERM)

    async def _drain(self, name: str) -> None:
        """By the first coordinator that answers; a drain without one is no drain."""
        front = self._rng.choice(self._cluster.coordinators)
        async with open_channel(self._cluster.address(front)) as channel:
            stub = admin_pb2_grpc.AdminServiceStub(channel)
            request = admin_pb2.DrainWorkerRequest(worker_id=name, deadline_s=5.0)
            with suppress(grpc.RpcError):
                await stub.DrainWorker(request, timeout=_DRAIN_S, metadata=self._cluster.token)

    def _later(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._undoing.add(task)
        task.add_done_callback(self._undoing.discard)

    def _note(self, kind: str, *names: str) -> None:
        self.count[kind] += 1
        self.log.append((time.time(), f"{kind}: {', '.join(names)}"))


def _signal(place: ProcessSlot, number: signal.Signals) -> None:
    """It may end by another fault at this very moment."""
    with suppress(*_GONE):
        place.kill(number)


def _role(name: str) -> str:
    return name.partition("-")[0]
