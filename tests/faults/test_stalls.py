"""An event loop that is held up: a pause, for neither its streams nor its place are lost."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from tests.faults.scenario import SILENT_S, Scenario, struck

pytestmark = pytest.mark.timeout(600)

MIXED = ("short-0", "short-1-sampled", "short-1", "json-0", "four-0-sampled")
STALL_S = 6.0
SLACK_S = 6.0  # for what has gathered


@pytest.mark.parametrize("busy", [False, True])
async def test_a_decode_worker_whose_event_loop_stalls_keeps_its_streams(
    alone: Scenario, busy: bool
) -> None:
    scenario = alone
    victim, hit, streams = await scenario.spread(MIXED, scenario.cluster.decode, tokens=4)
    before = scenario.done(victim, "stall")
    scenario.order(victim, "stall", times=1, for_s=STALL_S, busy=busy)
    os.kill(scenario.cluster[victim].pid, signal.SIGUSR1)
    stalled = time.monotonic()
    await scenario.until(lambda: scenario.done(victim, "stall") > before, 10, "the loop is held up")
    struck(any(not stream.is_over for stream in hit), "they were in mid-answer")
    states = set()
    while time.monotonic() < stalled + STALL_S - 0.5:
        states.add((await asyncio.to_thread(scenario.cluster.rows, scenario.front))[victim].state)
        await asyncio.sleep(0.3)
    assert states == {"ready"}
    await scenario.all_whole(streams)
    scenario.in_time([s.wait_after(stalled) for s in hit if s.ended_s > stalled], STALL_S + SLACK_S)
    for outcome in ("resumed", "retried"):
        assert scenario.rise(scenario.front, f"migrations_total{{outcome={outcome}}}") == 0
    stalls = f"worker_stalls_total{{worker={victim}}}"
    assert scenario.moved(scenario.front, stalls) == 1
    scenario.lift(victim)
    await scenario.finish()


async def test_a_worker_that_stops_in_a_stall_is_lost(alone: Scenario) -> None:
    """The thread that reports the stall stops with the process."""
    scenario = alone
    victim, hit, streams = await scenario.spread(MIXED, scenario.cluster.decode, tokens=4)
    before = scenario.done(victim, "stall")
    scenario.order(victim, "stall", times=1, for_s=10.0, busy=False)
    os.kill(scenario.cluster[victim].pid, signal.SIGUSR1)
    await scenario.until(lambda: scenario.done(victim, "stall") > before, 10, "the loop is held up")
    stalls = f"worker_stalls_total{{worker={victim}}}"
    await scenario.until(
        lambda: scenario.rise(scenario.front, stalls) >= 1, 10, "the stall is reported"
    )
    scenario.cluster[victim].freeze()
    frozen = time.monotonic()
    struck(any(not stream.is_over for stream in hit), "they were in mid-answer")
    await scenario.all_whole(streams)
    scenario.in_time([s.wait_after(frozen) for s in hit if s.ended_s > frozen], SILENT_S + 1.0)
    scenario.moved(scenario.front, "migrations_total{outcome=resumed}")
    scenario.cluster[victim].thaw()
    scenario.lift(victim)
    await scenario.finish()
