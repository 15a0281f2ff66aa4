"""What the world does to a cluster: clocks that jump, nights without work, full disks, crowds."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.base.errors import Overloaded
from tests.faults import checks
from tests.faults.bench import Bench
from tests.faults.scenario import Scenario, TooLate, seconds_of
from tests.faults.streams import Stream
from tests.support.stack import Stack
from tests.support.vitals import vitals

pytestmark = pytest.mark.timeout(1800)

SHORT = ("short-0", "short-1", "short-0-sampled", "short-1-sampled")
CROWD, CROWD_SHORT = 32, 12


async def test_wall_clock_jumps(scenario: Scenario, bench: Bench) -> None:
    """An hour forth, a day back, under load: no wait, lease or heartbeat is measured by it."""
    if bench.skew is None:
        pytest.skip("needs a C compiler")
    try:
        for jump in (3600.0, -86400.0, 0.0):
            cases = ("long-0", "long-1-sampled", *SHORT) if scenario.full else ("long-2", SHORT[2])
            streams = [scenario.ask(case) for case in cases]
            await asyncio.sleep(0.3)
            bench.skew.jump(jump)
            await scenario.all_whole(streams)
            assert all(r.state == "ready" for r in scenario.cluster.rows().values())
    finally:
        bench.skew.jump(0.0)
    for name in scenario.cluster.workers:
        lines = scenario.cluster.log_lines(name, scenario.log_mark(name))
        seen_s = [seconds_of(line["timestamp"]) for line in lines]
        # One of the jumps; a worker without a request meanwhile logs nothing.
        assert max(seen_s) - min(seen_s) > 3000, f"{name}: its clock did not jump"
        assert not [x for x in lines if "ran out" in str(x.get("event"))], f"{name} lost leases"
    await scenario.finish()


async def test_idle_then_a_burst(alone: Scenario) -> None:
    """Nothing happens for a long while, then many requests at once: connections, peers and leases
    of before are no obstacle, and clean-up did not wait for new work.
    """
    scenario = alone
    await scenario.all_whole(
        [scenario.ask(case) for case in (SHORT if scenario.full else ("load-0", "load-1"))]
    )
    await asyncio.sleep(1.0)
    await asyncio.to_thread(checks.at_rest, scenario.cluster, 1.0)
    idle_s = 600 if scenario.full else 3
    before = {name: vitals(scenario.cluster[name].pid) for name in scenario.cluster.workers}
    used = _cpu_s(scenario)
    await asyncio.sleep(idle_s)
    share = (_cpu_s(scenario) - used) / idle_s
    scenario.note(
        f"idle for {idle_s} s: {share:.1%} of a core for {len(scenario.cluster.places)} processes"
    )
    for name, was in before.items():
        grown = vitals(scenario.cluster[name].pid).resident_bytes - was.resident_bytes
        assert grown < 16 << 20, f"{name} grew by {grown} bytes while idle"
    begun = time.monotonic()
    many = (*SHORT, *SHORT, *SHORT, "long-0", "long-1-sampled")
    few = ("load-0", "load-1", "load-2", "load-3", *SHORT[1:3])
    cases = ("long-2", "long-2-sampled", *(many if scenario.full else few))
    streams = [scenario.ask(case) for case in cases]
    await scenario.all_whole(streams)
    scenario.note(f"a burst of {len(streams)} answered in {time.monotonic() - begun:.1f} s")
    await scenario.finish()


def _cpu_s(scenario: Scenario) -> float:
    total = 0
    for place in scenario.cluster.places:
        if place.alive:
            fields = Path(f"/proc/{place.pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    folder = tmp_path / "logs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, timeout=20).returncode:
        pytest.skip("cannot mount here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False, timeout=20)


def test_disk_full_where_logs_go(full_disk: Path, full: bool) -> None:
    """Log lines are lost and nothing else: the coordinator and its local workers serve on, one of
    them is killed and comes back, and all end in order.
    """
    flags = ("--max-model-len", "1024", "--kv-cache-memory", "64MiB", "--log-level", "debug")
    with Stack(full_disk, *flags) as stack:
        prompt = list(range(1000, 1200))
        tokens, _, _ = stack.generate(prompt, max_tokens=32)
        filler = (full_disk / "filler").open("wb", buffering=0)
        with filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError:
                pass
        for salt in range(4 if full else 2):
            again, _, _ = stack.generate(prompt, max_tokens=32, cache_salt=str(salt))
            assert again == tokens
        os.kill(stack.pid_of("decode-0"), 9)
        again, _, _ = stack.generate(prompt, max_tokens=32, cache_salt="after")
        assert again == tokens
        stack.assert_at_rest()
        assert os.statvfs(full_disk).f_bavail == 0, "it was full all the while"
    assert stack.process.returncode == 0


async def test_overload(scenario: Scenario) -> None:
    """Many more than may come in: the rest gets a time to come back, most of those find
    room then, and no admitted request, here or at the other coordinator, is harmed.
    """
    async with scenario.spare_front() as front:
        tries: list[tuple[Stream, float | None]] = []  # each with the promise it came back on

        async def insist(case: str) -> Stream:
            promised: float | None = None
            for _ in range(20):
                stream = scenario.ask(case, front=front)
                await stream.wait_for_end()
                tries.append((stream, promised))
                if stream.error is None:
                    return stream
                meaning = stream.api_error
                assert isinstance(meaning, Overloaded), f"{stream}: {stream.error!r}"
                assert not stream.tokens, "shed before anything was said"
                assert 0 < meaning.retry_after_s <= 60
                promised = meaning.retry_after_s
                await asyncio.sleep(promised)
            raise AssertionError(f"{case} found no room in 20 tries")

        crowd = CROWD if scenario.full else CROWD_SHORT
        for _ in range(5 if scenario.full else 1):
            answered = await asyncio.gather(*(insist(f"load-{i % 4}") for i in range(crowd)))
            for stream in answered:
                stream.check(scenario.oracle)
        came_back = [stream.error is None for stream, promise in tries if promise is not None]
        assert came_back, "no request was shed"
        share = sum(came_back) / len(came_back)
        scenario.note(f"{len(came_back)} came back when told, {share:.0%} of them found room")
        if share <= 0.5:
            raise TooLate(f"{share:.0%} of those that came back when told found room")
        by_tokens = [scenario.ask(case, front=front) for case in ("long-0", "long-1-sampled")]
        for stream in by_tokens:
            await stream.wait_for_end()
        shed = [stream for stream in by_tokens if stream.error is not None]
        assert len(shed) == 1 and isinstance(shed[0].api_error, Overloaded)
        scenario.moved(front, "admission_rejections_total{reason=requests}")
        scenario.moved(front, "admission_rejections_total{reason=tokens}")
    scenario.longest_wait_s = 5.0  # unrelated requests at the other coordinator
    await scenario.finish()
