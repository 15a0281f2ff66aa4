"""SIGSTOP past the lease, then SIGCONT: the worst of all deaths, for the dead come back.

frozen ............ lease over, blocks reused ............ awake, in the middle of its old work
"""

from __future__ import annotations

import asyncio
import time

import pytest

from coordinator.cluster.worker import HEARTBEAT_S
from tests.faults.scenario import LONG, SILENT_S, Scenario, struck
from tests.support.timeouts import LEASE_TTL_S

pytestmark = pytest.mark.timeout(600)

MIXED = ("short-0", "short-1-sampled", "json-0", "regex-0-sampled", "four-0-sampled")
SHORT = ("short-0", "short-1", "short-0-sampled", "short-1-sampled")


async def test_sigstop_of_p_past_the_lease(scenario: Scenario) -> None:
    """Prompts go on elsewhere; awake again, nothing that it sends is believed."""
    for round_ in range(6 if scenario.full else 1):
        for name in scenario.cluster.prefill:
            scenario.order(name, "late_ready", times=99, after_s=2.0)
        cases = ("three-long-sampled",) if round_ % 2 else LONG  # choices wait for one prompt
        victim, hit, streams = await scenario.spread(cases, scenario.cluster.prefill)
        scenario.cluster[victim].freeze()
        frozen = time.monotonic()
        struck(not any(stream.tokens for stream in hit), "no token is written yet")
        for name in scenario.cluster.prefill:
            scenario.lift(name)
        await scenario.all_whole(streams)
        scenario.in_time([s.wait_after(frozen) for s in hit], scenario.first_token_bound(SILENT_S))
        await _past_the_lease(scenario, frozen)
        scenario.cluster[victim].thaw()
        await scenario.all_whole(
            [scenario.ask(case) for case in (LONG if scenario.full else LONG[1:3])]
        )
        scenario.moved(scenario.front, "migrations_total{outcome=retried}")
        await scenario.whole()
        await asyncio.sleep(2 * HEARTBEAT_S if scenario.full else 0)  # all tell that they have room
    await scenario.finish()


async def test_sigstop_of_d_past_the_lease(scenario: Scenario) -> None:
    """Its answers go on elsewhere; awake again, it writes into calls that are not read."""
    for _ in range(5 if scenario.full else 1):
        victim, hit, streams = await scenario.spread(MIXED, scenario.cluster.decode, tokens=10)
        scenario.cluster[victim].freeze()
        frozen = time.monotonic()
        struck(any(not stream.is_over for stream in hit), "they were in mid-answer")
        await scenario.all_whole(streams)
        scenario.in_time([s.wait_after(frozen) for s in hit if s.ended_s > frozen], SILENT_S)
        await _past_the_lease(scenario, frozen)
        scenario.cluster[victim].thaw()
        await scenario.all_whole([scenario.ask(case) for case in SHORT])
        scenario.moved(scenario.front, "migrations_total{outcome=resumed}")
        await scenario.whole()
    await scenario.finish()


async def test_sigstop_of_d_before_a_read_past_the_lease(scenario: Scenario) -> None:
    """It wakes up with a read to post, of blocks whose lease is over and which hold another prompt
    by now: the fence refuses them, and not one token is made of them.
    """
    for _ in range(10 if scenario.full else 1):
        victim = "decode-0"
        scenario.order(victim, "data_posted_late", times=1, after_s=1.0)
        already = scenario.done(victim, "data_posted_late")
        streams = [scenario.ask(case) for case in LONG]
        await scenario.until(
            lambda n=already: scenario.done("decode-0", "data_posted_late") > n,
            30,
            "a read will go",
        )
        scenario.cluster[victim].freeze()
        frozen = time.monotonic()
        scenario.lift(victim)
        await scenario.all_whole(streams)
        scenario.in_time(
            [s.wait_after(frozen) for s in streams], scenario.first_token_bound(SILENT_S)
        )
        await _past_the_lease(scenario, frozen)
        # Other prompts take the blocks over, in both pools.
        others = ("long-0", "long-1-sampled")  # as many blocks as there are
        for _ in range(2 if scenario.full else 1):
            cases = (*LONG, *others) if scenario.full else others
            await scenario.all_whole([scenario.ask(case) for case in cases])
        scenario.cluster[victim].thaw()
        await scenario.all_whole(
            [scenario.ask(case) for case in (LONG if scenario.full else LONG[1:3])]
        )
        await scenario.whole()
    scenario.note(f"stale blocks refused: {scenario.rise('decode-0', 'kv_stale_reads_total'):g}")
    await scenario.finish()


async def _past_the_lease(scenario: Scenario, frozen: float) -> None:
    """Wait until no lease from before can be valid any more."""
    await asyncio.sleep(max(0.0, frozen + LEASE_TTL_S + 1.0 - time.monotonic()))
