"""Sends the requests of a plan at their times. Independent of the wire protocol."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Protocol

from benchmarks.plan import PlannedLane, Record


class Api(Protocol):
    """One way to send a request."""

    async def run(self, record: Record, prompt: tuple[int, ...], max_tokens: int) -> None:
        """Play one request into `record`."""

    async def close(self) -> None:
        """Close the connections."""


class Driver:
    """Sends the requests of all lanes to one API and records their results."""

    def __init__(self, api: Api, started_s: float) -> None:
        self._api = api
        self._started_s = started_s
        self.records: list[Record] = []

    async def play(self, lanes: tuple[PlannedLane, ...], limit_s: float) -> None:
        """Run all lanes to their end, or for `limit_s` seconds."""
        players = [self._closed(x) if x.concurrency else self._open(x) for x in lanes]
        tasks = [asyncio.ensure_future(player) for player in players]
        _, late = await asyncio.wait(tasks, timeout=limit_s)
        for task in late:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def _closed(self, lane: PlannedLane) -> None:
        """A closed loop: each stream sends its next prompt when its last request ended."""
        await self._sleep_until(lane.start_s)
        prompts = iter(lane.prompts)
        await asyncio.gather(*(self._stream(lane, prompts) for _ in range(lane.concurrency)))

    async def _stream(self, lane: PlannedLane, prompts: Iterator[tuple[int, ...]]) -> None:
        for prompt in prompts:
            now_s = self._now_s()
            if lane.until_s is not None and now_s >= lane.until_s:
                return
            await self._request(lane, prompt, now_s)

    async def _open(self, lane: PlannedLane) -> None:
        """An open loop: requests at their times, independent of earlier ones."""
        async with asyncio.TaskGroup() as group:
            for i, prompt in enumerate(lane.prompts):
                due_s = lane.arrival_s(i)
                if lane.until_s is not None and due_s >= lane.until_s:
                    return
                await self._sleep_until(due_s)
                group.create_task(self._request(lane, prompt, due_s))

    async def _request(self, lane: PlannedLane, prompt: tuple[int, ...], due_s: float) -> None:
        record = Record(lane.role, len(prompt), due_s, sent_s=self._now_s())
        self.records.append(record)
        try:
            await self._api.run(record, prompt, lane.max_tokens)
            if (got := sum(record.counts)) != lane.max_tokens:
                record.error = f"{got} tokens came, {lane.max_tokens} were asked for"
        except asyncio.CancelledError:
            record.error = "cut off at the run's limit"
            raise
        except Exception as error:  # whatever a client library raises is a failed request
            record.error = f"{type(error).__name__}: {error}"[:500]
        finally:
            record.end_s = self._now_s()

    def _now_s(self) -> float:
        return time.monotonic() - self._started_s

    async def _sleep_until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self._now_s()))
