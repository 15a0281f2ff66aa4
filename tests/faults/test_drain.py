"""Nobody is lost when a process is told to end: each worker is replaced in turn under load with no
failed request, and readiness goes first.
"""

from __future__ import annotations

import asyncio
import signal
import time

import grpc
import httpx
import pytest

from engine.pb.diptych.v1 import admin_pb2, admin_pb2_grpc
from engine.rpc.channel import open_channel
from tests.faults.scenario import KILL_S, Scenario, struck
from tests.support.http_get import http_get
from tests.support.process_slots import End

pytestmark = pytest.mark.timeout(600)

SHORT = ("short-0", "short-1", "short-0-sampled", "short-1-sampled")
DRAIN_S = 20.0


async def test_drain_of_each_role_under_load(row: Scenario) -> None:
    """Every worker in turn, by AdminService and by SIGTERM: each ends with status 0 and comes back,
    and every request that ran meanwhile is whole.
    """
    roles = row.cluster.prefill, row.cluster.decode
    pairs = list(zip(*roles, strict=True))
    steps = [(name,) for name in row.cluster.workers] * 3 if row.full else pairs
    for i, names in enumerate(steps):  # shortened: one of each role at a time
        cases = ("long-0", *SHORT) if row.full else SHORT[1:3]
        streams = [row.ask(case) for case in ("long-2-sampled", *cases)]
        await asyncio.sleep(0.3)
        by_signal = (i + i // len(row.cluster.workers)) % 2 == 1
        await asyncio.gather(*(_replace(row, name, by_signal) for name in names))
        await row.all_whole(streams)
        await row.whole()
    await row.finish()


async def _replace(row: Scenario, name: str, by_signal: bool) -> None:
    num_ends = len(row.cluster[name].ends)
    row.cluster[name].wanted = True
    begun = time.monotonic()
    if by_signal:
        row.cluster[name].kill(signal.SIGTERM)
    else:
        await _drain(row, name)
    await row.until(lambda: len(row.cluster[name].ends) > num_ends, 60, "it ends")
    row.note(f"{name} drained in {time.monotonic() - begun:.1f} s")
    assert row.cluster[name].ends[-1] == End(0, wanted=True)


async def test_readiness_goes_before_the_last_answer(row: Scenario) -> None:
    """While its last answers are written a worker is not ready any more, by every way to ask."""
    victim, hit, streams = await row.spread(SHORT, row.cluster.decode, tokens=5)
    incarnation = row.cluster.rows()[victim].incarnation
    row.cluster[victim].kill(signal.SIGTERM)
    await row.until(lambda: _ready(row, victim) == 503, 2, "it is not ready")
    struck(any(not stream.over for stream in hit), "it still writes")

    def is_known() -> bool:
        seen = row.cluster.rows()[victim]
        return seen.incarnation != incarnation or seen.state != "ready"

    await row.until(is_known, 2, "the coordinator knows it")
    late = SHORT if row.full else [f"load-{i}" for i in range(4)]
    await row.all_whole([*streams, *(row.ask(case) for case in late)])
    await row.whole()
    await row.finish()


async def test_a_second_sigterm_forces(row: Scenario) -> None:
    """It hands over what it has instead of finishing it: others go on at once."""
    victim, hit, streams = await row.spread(SHORT, row.cluster.decode, tokens=5)
    num_ends = len(row.cluster[victim].ends)
    row.cluster[victim].kill(signal.SIGTERM)
    await asyncio.sleep(0.05)
    told = time.monotonic()
    row.cluster[victim].kill(signal.SIGTERM)
    await row.until(lambda: len(row.cluster[victim].ends) > num_ends, 10, "it ends")
    row.note(f"ended {time.monotonic() - told:.1f} s after the second signal")
    assert row.cluster[victim].ends[-1] == End(0, wanted=True)
    await row.all_whole(streams)
    row.in_time([s.wait_after(told) for s in hit], KILL_S)
    await row.whole()
    await row.finish()


async def test_drain_of_a_coordinator(row: Scenario) -> None:
    """SIGTERM: not ready, no new request, those inside finish, status 0."""
    leaving = row.front
    await row.move_load(row.cluster.coordinators[1])
    num_ends = len(row.cluster[leaving].ends)
    streams = [row.ask(case, front=leaving) for case in SHORT]
    for stream in streams:
        await stream.come(5)
    row.cluster[leaving].kill(signal.SIGTERM)
    await row.until(lambda: _ready(row, leaving) == 503, 2, "it is not ready")
    refused = row.ask("short-0", front=leaving)
    await row.all_whole(streams)
    await refused.end(10)
    assert isinstance(refused.error, grpc.RpcError)
    assert refused.error.code() is grpc.StatusCode.UNAVAILABLE
    await row.until(lambda: len(row.cluster[leaving].ends) > num_ends, 30, "it ends")
    assert row.cluster[leaving].ends[-1] == End(0, wanted=True)
    await row.whole()
    await row.finish()


async def _drain(row: Scenario, name: str) -> None:
    async with open_channel(row.cluster.address(row.front)) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        request = admin_pb2.DrainWorkerRequest(worker_id=name, deadline_s=DRAIN_S)
        await stub.DrainWorker(request, timeout=60, metadata=row.cluster.token)


def _ready(row: Scenario, name: str) -> int:
    try:
        return http_get(f"http://{row.cluster.http(name)}/health/ready", 2).status_code
    except httpx.HTTPError:
        return 0
