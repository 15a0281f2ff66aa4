"""No request is lost when a process is asked to end: each worker is replaced in turn under load
with no failed request, and readiness goes first.
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


async def test_drain_of_each_role_under_load(scenario: Scenario) -> None:
    """Every worker in turn, by AdminService and by SIGTERM: each ends with status 0 and comes back,
    and every request that ran meanwhile is whole.
    """
    roles = scenario.cluster.prefill, scenario.cluster.decode
    pairs = list(zip(*roles, strict=True))
    steps = [(name,) for name in scenario.cluster.workers] * 3 if scenario.full else pairs
    for i, names in enumerate(steps):  # shortened: one of each role at a time
        cases = ("long-0", *SHORT) if scenario.full else SHORT[1:3]
        streams = [scenario.ask(case) for case in ("long-2-sampled", *cases)]
        await asyncio.sleep(0.3)
        by_signal = (i + i // len(scenario.cluster.workers)) % 2 == 1
        await asyncio.gather(*(_replace(scenario, name, by_signal) for name in names))
        await scenario.all_whole(streams)
        await scenario.whole()
    await scenario.finish()


async def _replace(scenario: Scenario, name: str, by_signal: bool) -> None:
    num_ends = len(scenario.cluster[name].ends)
    scenario.cluster[name].wanted = True
    begun = time.monotonic()
    if by_signal:
        scenario.cluster[name].kill(signal.SIGTERM)
    else:
        await _drain(scenario, name)
    await scenario.until(lambda: len(scenario.cluster[name].ends) > num_ends, 60, "it ends")
    scenario.note(f"{name} drained in {time.monotonic() - begun:.1f} s")
    assert scenario.cluster[name].ends[-1] == End(0, wanted=True)


async def test_readiness_goes_before_the_last_answer(scenario: Scenario) -> None:
    """While its last answers are written a worker is not ready any more, by every way to ask."""
    victim, hit, streams = await scenario.spread(SHORT, scenario.cluster.decode, tokens=5)
    incarnation = scenario.cluster.rows()[victim].incarnation
    scenario.cluster[victim].kill(signal.SIGTERM)
    await scenario.until(lambda: _ready(scenario, victim) == 503, 2, "it is not ready")
    struck(any(not stream.is_over for stream in hit), "it still writes")

    def is_known() -> bool:
        seen = scenario.cluster.rows()[victim]
        return seen.incarnation != incarnation or seen.state != "ready"

    await scenario.until(is_known, 2, "the coordinator knows it")
    late = SHORT if scenario.full else [f"load-{i}" for i in range(4)]
    await scenario.all_whole([*streams, *(scenario.ask(case) for case in late)])
    await scenario.whole()
    await scenario.finish()


async def test_a_second_sigterm_forces(scenario: Scenario) -> None:
    """It hands over what it has instead of finishing it: others go on at once."""
    victim, hit, streams = await scenario.spread(SHORT, scenario.cluster.decode, tokens=5)
    num_ends = len(scenario.cluster[victim].ends)
    scenario.cluster[victim].kill(signal.SIGTERM)
    await asyncio.sleep(0.05)
    told = time.monotonic()
    scenario.cluster[victim].kill(signal.SIGTERM)
    await scenario.until(lambda: len(scenario.cluster[victim].ends) > num_ends, 10, "it ends")
    scenario.note(f"ended {time.monotonic() - told:.1f} s after the second signal")
    assert scenario.cluster[victim].ends[-1] == End(0, wanted=True)
    await scenario.all_whole(streams)
    scenario.in_time([s.wait_after(told) for s in hit], KILL_S)
    await scenario.whole()
    await scenario.finish()


async def test_drain_of_a_coordinator(scenario: Scenario) -> None:
    """SIGTERM: not ready, no new request, those inside finish, status 0."""
    leaving = scenario.front
    await scenario.move_load(scenario.cluster.coordinators[1])
    num_ends = len(scenario.cluster[leaving].ends)
    streams = [scenario.ask(case, front=leaving) for case in SHORT]
    for stream in streams:
        await stream.wait_for_tokens(5)
    scenario.cluster[leaving].kill(signal.SIGTERM)
    await scenario.until(lambda: _ready(scenario, leaving) == 503, 2, "it is not ready")
    refused = scenario.ask("short-0", front=leaving)
    await scenario.all_whole(streams)
    await refused.wait_for_end(10)
    assert isinstance(refused.error, grpc.RpcError)
    assert refused.error.code() is grpc.StatusCode.UNAVAILABLE
    await scenario.until(lambda: len(scenario.cluster[leaving].ends) > num_ends, 30, "it ends")
    assert scenario.cluster[leaving].ends[-1] == End(0, wanted=True)
    await scenario.whole()
    await scenario.finish()


async def _drain(scenario: Scenario, name: str) -> None:
    async with open_channel(scenario.cluster.address(scenario.front)) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        request = admin_pb2.DrainWorkerRequest(worker_id=name, deadline_s=DRAIN_S)
        await stub.DrainWorker(request, timeout=60, metadata=scenario.cluster.token)


def _ready(scenario: Scenario, name: str) -> int:
    try:
        return http_get(f"http://{scenario.cluster.http(name)}/health/ready", 2).status_code
    except httpx.HTTPError:
        return 0
