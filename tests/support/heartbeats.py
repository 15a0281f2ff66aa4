"""Heartbeats of workers that a test registers itself, so that a slow machine makes none silent."""

from __future__ import annotations

import asyncio

from coordinator.cluster.membership import Membership
from coordinator.cluster.worker import HEARTBEAT_S, Load, Worker


class Heartbeats:
    """One task for each worker; it repeats the worker's last load until it is lost or replaced."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def send(self, worker: Worker, load: Load | None = None) -> None:
        """Send one now, and the same from now on."""
        self.silence(worker.peer.worker_id)
        load = load or Load()
        assert self._membership.heartbeat(worker, load)
        self._tasks[worker.peer.worker_id] = asyncio.create_task(self._repeat(worker, load))

    def silence(self, worker_id: str) -> None:
        """Send no more; the worker stays registered."""
        if worker_id in self._tasks:
            self._tasks[worker_id].cancel()

    def lose(self, worker: Worker, reason: str) -> None:
        """The worker's stream breaks."""
        self.silence(worker.peer.worker_id)
        self._membership.lost(worker, reason)

    async def close(self) -> None:
        """End all tasks."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _repeat(self, worker: Worker, load: Load) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if not self._membership.heartbeat(worker, load):
                return
