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


async def test_sigstop_of_p_past_the_lease(row: Scenario) -> None:
    """Prompts go on elsewhere; awake again, it has nothing to say that anybody believes."""
    for round_ in range(6 if row.full else 1):
        for name in row.cluster.prefill:
            row.order(name, "late_ready", times=99, after_s=2.0)
        cases = ("three-long-sampled",) if round_ % 2 else LONG  # choices wait for one prompt
        victim, hit, streams = await row.spread(cases, row.cluster.prefill)
        row.cluster[victim].freeze()
        frozen = time.monotonic()
        struck(not any(stream.tokens for stream in hit), "no token is written yet")
        for name in row.cluster.prefill:
            row.lift(name)
        await row.all_whole(streams)
        row.in_time([s.wait_after(frozen) for s in hit], row.first_token_bound(SILENT_S))
        await _past_the_lease(row, frozen)
        row.cluster[victim].thaw()
        await row.all_whole([row.ask(case) for case in (LONG if row.full else LONG[1:3])])
        row.moved(row.front, "migrations_total{outcome=retried}")
        await row.whole()
        await asyncio.sleep(2 * HEARTBEAT_S if row.full else 0)  # all tell that they have room
    await row.finish()


async def test_sigstop_of_d_past_the_lease(row: Scenario) -> None:
    """Its answers go on elsewhere; awake again, it writes into calls that nobody reads."""
    for _ in range(5 if row.full else 1):
        victim, hit, streams = await row.spread(MIXED, row.cluster.decode, tokens=10)
        row.cluster[victim].freeze()
        frozen = time.monotonic()
        struck(any(not stream.over for stream in hit), "they were in mid-answer")
        await row.all_whole(streams)
        row.in_time([s.wait_after(frozen) for s in hit if s.ended_s > frozen], SILENT_S)
        await _past_the_lease(row, frozen)
        row.cluster[victim].thaw()
        await row.all_whole([row.ask(case) for case in SHORT])
        row.moved(row.front, "migrations_total{outcome=resumed}")
        await row.whole()
    await row.finish()


async def test_sigstop_of_d_before_a_read_past_the_lease(row: Scenario) -> None:
    """It wakes up with a read to post, of blocks whose lease is over and which hold another prompt
    by now: the fence refuses them, and not one token is made of them.
    """
    for _ in range(10 if row.full else 1):
        victim = "decode-0"
        row.order(victim, "data_posted_late", times=1, after_s=1.0)
        already = row.done(victim, "data_posted_late")
        streams = [row.ask(case) for case in LONG]
        await row.until(
            lambda n=already: row.done("decode-0", "data_posted_late") > n, 30, "a read will go"
        )
        row.cluster[victim].freeze()
        frozen = time.monotonic()
        row.lift(victim)
        await row.all_whole(streams)
        row.in_time([s.wait_after(frozen) for s in streams], row.first_token_bound(SILENT_S))
        await _past_the_lease(row, frozen)
        # Other prompts take the blocks over, in both pools.
        others = ("long-0", "long-1-sampled")  # as many blocks as there are
        for _ in range(2 if row.full else 1):
            cases = (*LONG, *others) if row.full else others
            await row.all_whole([row.ask(case) for case in cases])
        row.cluster[victim].thaw()
        await row.all_whole([row.ask(case) for case in (LONG if row.full else LONG[1:3])])
        await row.whole()
    row.note(f"stale blocks refused: {row.rise('decode-0', 'kv_stale_reads_total'):g}")
    await row.finish()


async def _past_the_lease(row: Scenario, frozen: float) -> None:
    """Wait until no lease from before can be valid any more."""
    await asyncio.sleep(max(0.0, frozen + LEASE_TTL_S + 1.0 - time.monotonic()))
