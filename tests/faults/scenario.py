"""What a scenario works with: a whole cluster, an oracle, requests, the checks after it.

whole -> Before noted -> background load -> the scenario: break, watch -> load ended -> whole again
      -> at rest, steady, quiet -> counters moved
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any

import httpx

from tests.faults import checks
from tests.faults.load import Load
from tests.faults.oracle import CASES, Case, Oracle, Pace
from tests.faults.streams import Sender, Stream
from tests.support.cluster import SPARE, Cluster
from tests.support.stack import until
from tests.support.timeouts import PENALTY_S

KILL_S = 2.0  # with a spare the next token comes within this after a kill
SILENT_S = 5.0  # and within this after a SIGSTOP or a partition
_LONGEST_WAIT_S = 12.0  # of unrelated requests, which may have been on the worker that was broken
LONG = ("long-2", "long-2", "long-2-sampled", "long-2-sampled")  # three fit into a pool
_salts = itertools.count(1)
NOTES: dict[str, list[str]] = {}  # measured results by scenario


class TooLate(AssertionError):
    """Right, but not in time: others use the machine too, and the short form gives such a scenario
    another try (conftest). Every try is printed.
    """


class Missed(AssertionError):
    """The scenario missed the moment it is about: it has shown nothing, and gets another try."""


def struck(was: bool, moment: str) -> None:
    """Raise Missed unless the scenario's moment was hit."""
    if not was:
        raise Missed(moment)


class Scenario:
    """One scenario in progress. Lives in the loop of its test."""

    def __init__(self, name: str, cluster: Cluster, oracle: Oracle, *, full: bool) -> None:
        self.name = name
        self.cluster = cluster
        self.oracle = oracle
        self.full = full
        self.explained: list[str] = []  # tracebacks that this scenario's fault explains
        self.longest_wait_s = _LONGEST_WAIT_S
        self.front = cluster.coordinators[0]
        self.sender = Sender()
        self._load: Load | None = None
        self._then: dict[str, checks.Before] = {}
        self._counters: dict[str, tuple[int, dict[str, float]]] = {}
        self._streams: list[Stream] = []
        self._held = {place.name for place in cluster.places if place.held}

    async def begin(self, *, load: bool) -> None:
        """Wait until everything is whole, trusted and at rest, note how it is, start the background
        load. Measures the pace first, where that has not been done lately.
        """
        await self.whole()
        self._then = checks.before(self.cluster)  # where logs end, for what the measuring does
        pace = self.oracle.pace
        if pace is None or (self.full and not pace.holds(self.cluster.folder)):
            slowest_s = max([await self._pace() for _ in range(2 if self.full else 1)])
            self.oracle.pace = Pace(slowest_s, self.cluster.folder, time.monotonic())
            self.note(f"four prompts after the loss of a prefill worker: {slowest_s:.2f} s")
        await self.all_trusted()
        await asyncio.to_thread(checks.at_rest, self.cluster)
        if changed := await asyncio.to_thread(
            self.oracle.confirm, self.cluster.address(self.front)
        ):
            self.note(changed)
        self._then = checks.before(self.cluster)
        for place in self.cluster.places:
            if place.alive:
                self._counters[place.name] = (place.pid, self.samples(place.name))
        if load:
            self._load = self._new_load()
            self._load.begin()

    def _new_load(self) -> Load:
        pace: dict[str, Any] = {} if self.full else {"num_senders": 1, "pause_s": 0.4}
        return Load(self.sender, self.fronts, self.oracle, **pace)

    async def _pace(self) -> float:
        """Lose a prefill worker, ask when that is known: seconds to the last first token."""
        await self.all_trusted()
        self._load = self._new_load()
        self._load.begin()
        lost = self.cluster.prefill[-1]
        before = self.cluster.rows()[lost].incarnation

        def known() -> bool:
            row = self.cluster.rows().get(lost)
            return row is None or row.state != "ready" or row.incarnation != before

        self.kill(lost)
        await self.until(known, 10, "the loss is known")
        streams = [self.ask(case) for case in LONG]
        for stream in streams:
            await stream.wait_for_tokens(1)
        for stream in streams:
            await stream.cancel()
        await self._load.end(math.inf)
        self._load = None
        self._note_doubts()
        await self.whole()
        return max(stream.token_times_s[0] - stream.sent_s for stream in streams)

    async def finish(self, rest_s: float = checks.REST_S) -> None:
        """Everything that must hold whatever was broken."""
        if self._load:
            await self._load.end(self.longest_wait_s)
        for stream in self._streams:
            if not stream.is_over:
                await stream.cancel()
        self._note_doubts()
        await self.whole()
        await asyncio.to_thread(checks.at_rest, self.cluster, rest_s)
        checks.steady(self.cluster, self._then)
        checks.quiet(self.cluster, self._then, self.explained)

    async def give_up(self) -> None:
        """After a failure: leave the cluster usable for the next scenario."""
        for place in self.cluster.places:
            place.thaw()
            place.held = place.name in self._held
        self.cluster.network.heal()
        self._note_doubts()
        for name in self.cluster.workers:
            with suppress(OSError):
                self.cluster.orders(name).unlink(missing_ok=True)
        if self._load:
            with suppress(Exception):
                await asyncio.wait_for(self._load.end(1e9), 60)

    def _note_doubts(self) -> None:
        """A worker that failed a request is avoided for a while, if it is the same process: see
        `all_trusted`.
        """
        for front in self.cluster.coordinators:
            since = self._then[front].log_bytes if front in self._then else 0
            for line in self.cluster.log_lines(front, since):
                if line.get("event") != "attempt lost":
                    continue
                happened = time.monotonic() - (time.time() - seconds_of(str(line["timestamp"])))
                name = line["prefill"] if line["lost"] == "prefill" else line["worker"]
                place = self.cluster[str(name)]
                if place.alive and place.started_s < happened:
                    self.cluster.trusted_at = max(self.cluster.trusted_at, happened + PENALTY_S)

    def note(self, what: str) -> None:
        """A measured result, printed at the end of the run."""
        NOTES.setdefault(self.name, []).append(what)

    def in_time(self, waits: Sequence[float], bound_s: float) -> None:
        """Each stream that was hit had its next token within the bound."""
        struck(bool(waits), "a stream was hit")
        self.note(f"next token after {max(waits):.2f} s (bound {bound_s:.1f} s, {len(waits)} hit)")
        if max(waits) >= bound_s:
            raise TooLate(f"next tokens after {waits}, the bound is {bound_s:.1f} s")

    def first_token_bound(self, bound_s: float) -> float:
        """A bound for requests whose prompts may have to be computed again, where half of a pool
        is gone and its successor starts: so much more than the same prompts take if they come when
        a loss has just become known. Measured on this machine; in full, minutes earlier.
        """
        assert self.oracle.pace is not None
        return bound_s + self.oracle.pace.first_token_s

    # -- asking ------------------------------------------------------------------------------------

    async def move_load(self, front: str) -> None:
        """From now on unrelated requests go there; returns when none is left elsewhere."""
        self.front = front
        if self._load:
            await self._load.moved()

    def fronts(self) -> list[str]:
        """Addresses of the coordinators that the background load uses."""
        return [self.cluster.address(self.front)]

    def ask(self, case: Case | str, *, salt: str | None = None, **options: Any) -> Stream:
        """Begin a request; without a `salt` its prompt is new to every cache."""
        case = CASES[case] if isinstance(case, str) else case
        front = options.pop("front", self.front)
        salt = fresh_salt() if salt is None else salt
        stream = self.sender.send(self.cluster.address(front), case, salt=salt, **options)
        self._streams.append(stream)
        return stream

    async def all_whole(self, streams: Sequence[Stream], timeout_s: float = 90.0) -> None:
        """All end well, with the undisturbed answer."""
        for stream in streams:
            await stream.wait_for_end(timeout_s)
        for stream in streams:
            stream.check(self.oracle)

    # -- looking -----------------------------------------------------------------------------------

    async def all_trusted(self) -> None:
        """Until no worker is avoided for an earlier scenario's fault: a spare is a spare then, and
        prompts are computed by prefill workers.
        """
        await asyncio.sleep(max(0.0, self.cluster.trusted_at - time.monotonic()))

    async def whole(self, timeout_s: float = 120.0) -> None:
        """Until every place is filled and known."""
        await asyncio.to_thread(self.cluster.until_whole, timeout_s)

    async def until(self, check: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Poll without blocking the loop."""
        deadline = time.monotonic() + timeout_s
        while not await asyncio.to_thread(check):
            assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
            await asyncio.sleep(0.02)

    async def server_of(self, stream: Stream, pool: Sequence[str]) -> str:
        """Which worker of `pool` serves a request, by its holds."""
        return (await self.servers([stream], pool))[0]

    async def servers(self, streams: Sequence[Stream], pool: Sequence[str]) -> list[str]:
        """The same for several at once. A worker in a long step answers late, so that some may have
        ended meanwhile: those are in its log.
        """
        found: dict[str, str] = {}
        ids = {stream.request_id for stream in streams}

        def look() -> bool:
            with ThreadPoolExecutor(len(pool)) as threads:
                for name, held in zip(pool, threads.map(self.holds, pool), strict=True):
                    ended = self.cluster.log_lines(name, self.log_mark(name))
                    seen = held | {str(line.get("request_id")) for line in ended}
                    found.update(dict.fromkeys(ids & seen, name))
            return len(found) == len(ids)

        await self.until(look, 10, f"one of {list(pool)} serves each of {len(streams)}")
        return [found[stream.request_id] for stream in streams]

    async def spread(
        self, cases: Sequence[str], pool: Sequence[str], tokens: int = 0
    ) -> tuple[str, list[Stream], list[Stream]]:
        """Ask all cases at once and choose a worker to break: (it, its streams, all streams).

        The one with both greedy and sampled requests, else with the most. With `tokens` they have
        come so far before it is chosen.
        """
        await self.all_trusted()
        streams = [self.ask(case) for case in cases]
        by_name: dict[str, list[Stream]] = {name: [] for name in pool}
        for stream, name in zip(streams, await self.servers(streams, pool), strict=True):
            by_name[name].append(stream)
        for stream in streams:
            await stream.wait_for_tokens(tokens)

        def worth(name: str) -> tuple[int, int]:
            mine = by_name[name]
            return len({bool(s.case.sampling) for s in mine}), len(mine)

        victim = max(pool, key=worth)
        return victim, by_name[victim], streams

    def holds(self, name: str) -> set[str]:
        """Owners of what a worker holds; requests own by their ids."""
        try:
            found = checks.holds(self.cluster.http(name), self.cluster.token)["holds"]
            return {str(hold["owner"]) for hold in found}
        except httpx.HTTPError:
            return set()

    def samples(self, name: str) -> dict[str, float]:
        """A process's metrics now; empty while it does not answer."""
        try:
            return checks.samples(self.cluster.http(name))
        except httpx.HTTPError:
            return {}

    def log_mark(self, name: str) -> int:
        """Where a process's log ended when the scenario began."""
        return self._then[name].log_bytes

    def telling_lines(self, name: str) -> str:
        """A process's log lines on this scenario's requests, and its warnings since the start."""
        ids = {stream.request_id for stream in self._streams}
        since = self._then[name].log_bytes if name in self._then else 0
        told = [
            line
            for line in self.cluster.log_lines(name, since)
            if line.get("level") not in ("info", "debug") or line.get("request_id") in ids
        ]
        return "\n".join(json.dumps(line)[:1500] for line in told[-40:])

    def rise(self, name: str, counter: str) -> float:
        """How much a counter of a process rose in this scenario; a new process began at 0."""
        pid, then = self._counters.get(name, (0, {}))
        same = self.cluster[name].alive and self.cluster[name].pid == pid
        return self.samples(name).get(counter, 0.0) - (then.get(counter, 0.0) if same else 0.0)

    def moved(self, names: Sequence[str] | str, counter: str, at_least: float = 1) -> float:
        """Assert that the counter of this scenario's fault rose on these processes together."""
        listed = [names] if isinstance(names, str) else list(names)
        total = sum(self.rise(name, counter) for name in listed if self.cluster[name].alive)
        assert total >= at_least, f"{counter} rose by {total:g} on {listed}, not {at_least:g}"
        return total

    # -- breaking ----------------------------------------------------------------------------------

    def kill(self, name: str) -> float:
        """kill -9; returns the moment. The process is gone then."""
        place, killed = self.cluster[name], time.monotonic()
        process = place.process
        assert process is not None, f"{name} is down already"
        place.kill()
        until(lambda: process.poll() is not None, 5, f"{name} ends", interval_s=0.001)
        return killed

    async def take_down(self, names: Sequence[str]) -> None:
        """kill -9, and nothing comes back before `bring_back`."""
        for name in names:
            self.cluster[name].held = True
            if self.cluster[name].alive:
                self.cluster[name].kill()
        await self.until(lambda: not any(self.cluster[n].alive for n in names), 10, "they end")

    async def bring_back(self, names: Sequence[str]) -> None:
        """Let the places fill again, and wait until all know it."""
        for name in names:
            self.cluster[name].held = False
        await self.whole()

    @asynccontextmanager
    async def spare_front(self) -> AsyncIterator[str]:
        """The spare coordinator, running and whole within the block."""
        self.cluster[SPARE].held = False
        try:
            await self.until(lambda: self.cluster[SPARE].alive, 10, "the spare coordinator starts")
            await self.whole()
            yield SPARE
        finally:
            await self.take_down([SPARE])

    def order(self, name: str, fault: str, *, times: int = 1, **values: Any) -> None:
        """Order a worker to break something; replaces its earlier order."""
        order = {fault: {"id": next(_salts), "times": times, **values}}
        path = self.cluster.orders(name)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(order))
        part.rename(path)

    def lift(self, name: str) -> None:
        """No more orders."""
        self.cluster.orders(name).unlink(missing_ok=True)

    def done(self, name: str, fault: str) -> int:
        """How often a worker carried out a fault, since ever."""
        path = self.cluster.orders(name).with_suffix(".done")
        return path.read_text().split().count(fault) if path.exists() else 0


def seconds_of(timestamp: str) -> float:
    """The moment of a log line, of the wall clock."""
    return datetime.fromisoformat(timestamp).timestamp()


def fresh_salt() -> str:
    """A salt that no request had before."""
    return f"row{next(_salts)}-{time.monotonic_ns()}"
