"""Memory: pools that run full, prefix hits of every size, and a cancel in every state. One prefill
and one decode worker, so that a request can only be in one place.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest

from tests.faults import checks
from tests.faults.bench import Bench, SharedBench
from tests.faults.leases import calls, leased
from tests.faults.scenario import Scenario, TooLate, fresh_salt, struck
from tests.faults.streams import Stream
from tests.support.cluster import NUM_BLOCKS, Cluster
from tests.support.timeouts import LEASE_TTL_S

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("one_pair")]

P, D = "prefill-0", "decode-0"
SPARES = ("prefill-1", "decode-1")
FREE_S = 1.0  # for everything that a cancelled request held
BLOCK = 16
LATE_S = LEASE_TTL_S + 1.5  # before the bench's --pull-timeout-s is over


@pytest.fixture(scope="module")
def spares_return(benches: SharedBench) -> Iterator[None]:
    """At the end of the module."""
    yield
    cluster = benches.get().cluster
    for name in SPARES:
        cluster[name].held = False
    cluster.until_whole()


@pytest.fixture
def one_pair(bench: Bench, spares_return: None) -> None:
    """The spares are away."""
    _hold(bench.cluster, [name for name in SPARES if not bench.cluster[name].held])


def _hold(cluster: Cluster, names: list[str]) -> None:
    for name in names:
        cluster[name].held = True
        cluster[name].kill()
    deadline = time.monotonic() + 10
    while any(cluster[name].alive for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- cancel in every state -------------------------------------------------------------------------


async def test_cancel_while_queued(alone: Scenario) -> None:
    """It waits in the coordinator for a decode worker: nothing anywhere remembers it."""
    scenario = alone
    await scenario.take_down([D])
    streams = [scenario.ask(case) for case in ("long-0", "short-0-sampled")]
    await scenario.until(
        lambda: scenario.samples(scenario.front)["num_requests_waiting"] >= 2, 10, "they are queued"
    )
    await _cancel(scenario, streams)
    await scenario.bring_back([D])
    await scenario.finish()


async def test_cancel_while_prefilling(alone: Scenario) -> None:
    """The prefill worker is in mid-prompt, the decode worker has its room reserved."""
    scenario = alone
    scenario.order(P, "late_ready", times=99, after_s=2.0)
    streams = [scenario.ask(case) for case in ("long-0", "long-1-sampled")]
    for stream in streams:
        await scenario.server_of(stream, [P])
    await _cancel(scenario, streams)
    scenario.lift(P)
    await scenario.finish()


async def test_cancel_with_a_chunk_in_flight(alone: Scenario) -> None:
    """A read into its blocks is under way: they are free when the read has ended, not before."""
    scenario = alone
    scenario.order(D, "data_ends_late", times=99, after_s=0.4)
    already = scenario.done(D, "data_ends_late")
    streams = [scenario.ask(case) for case in ("long-0", "long-1-sampled")]
    await scenario.until(
        lambda: scenario.done(D, "data_ends_late") > already, 20, "a read is under way"
    )
    await _cancel(scenario, streams)
    scenario.lift(D)
    await scenario.finish()


async def test_cancel_while_queued_for_decode(alone: Scenario) -> None:
    """It waits in the decode worker for room that others have; they are not disturbed."""
    scenario = alone
    scenario.order(D, "data_ends_late", times=2, after_s=2.0)
    first = [scenario.ask(case) for case in ("long-0", "long-1-sampled")]
    await scenario.until(
        lambda: checks.num_held(scenario.cluster.http(D)) > 100, 10, "the pool is full"
    )
    queued = scenario.ask("long-1-sampled")
    await scenario.until(
        lambda: scenario.samples(D)["num_requests_waiting"] >= 1, 10, "the third waits for room"
    )
    await queued.cancel()
    cancelled = time.monotonic()
    await scenario.until(
        lambda: queued.request_id not in scenario.holds(D), FREE_S, "it is not queued any more"
    )
    scenario.note(f"forgotten after {time.monotonic() - cancelled:.2f} s")
    scenario.lift(D)
    await scenario.all_whole(first)
    await scenario.finish()


async def test_cancel_while_decoding(alone: Scenario) -> None:
    """In mid-answer."""
    scenario = alone
    for _ in range(20 if scenario.full else 1):
        streams = [scenario.ask(case) for case in ("short-0", "json-0-sampled", "four-0-sampled")]
        for stream in streams:
            await stream.wait_for_tokens(5)
        await _cancel(scenario, streams)
    await scenario.finish()


async def _cancel(scenario: Scenario, streams: list[Stream]) -> None:
    """Cancel all and time until no block, lease or call is left on either worker."""
    await asyncio.gather(*(stream.cancel() for stream in streams))
    cancelled = time.monotonic()
    while left := await asyncio.to_thread(checks.unrest, scenario.cluster):
        if time.monotonic() >= cancelled + FREE_S:
            raise TooLate(f"after {FREE_S:g} s still: {left}")
        await asyncio.sleep(0.01)
    scenario.note(f"all free after {time.monotonic() - cancelled:.2f} s (bound {FREE_S:g} s)")
    for stream in streams:
        stream.check_so_far(scenario.oracle)


# -- full pools ------------------------------------------------------------------------------------


async def test_d_full_in_mid_transfer(alone: Scenario) -> None:
    """While a long prompt's blocks arrive, the answers beside it use up the rest of the pool: the
    youngest of them gives way, and the transfer goes on.
    """
    scenario = alone
    for _ in range(5 if scenario.full else 1):
        long = scenario.ask("long-0")
        scenario.order(P, "late_ready", times=3, after_s=1.5, only=long.request_id)
        await scenario.until(
            lambda: checks.num_held(scenario.cluster.http(D)) > 50, 10, "it has its room"
        )
        # Seven answers begin with 5 blocks each and end with 14: beside the prompt's 53 too many.
        streams = [scenario.ask(f"short-2{'-sampled' if i % 2 else ''}") for i in range(7)]
        await scenario.all_whole([*streams, long])
        scenario.lift(P)
    scenario.moved(D, "num_preemptions_total")
    await scenario.finish()


async def test_preemption_after_transfer(alone: Scenario) -> None:
    """Two long answers outgrow the pool: the younger gives up blocks that it has just fetched, and
    comes back as a prefix hit.
    """
    scenario = alone
    for _ in range(5 if scenario.full else 1):
        streams = [scenario.ask(case) for case in ("long-0", "long-1-sampled")]
        await scenario.all_whole(streams)
    scenario.moved(D, "num_preemptions_total")
    await scenario.finish()


# -- blocks that are not what they were -----------------------------------------------------------


async def test_a_lease_that_ends_before_its_blocks_are_read(alone: Scenario) -> None:
    """No renewal arrives, the pool is full of others' blocks, and the first blocks to become free
    are those that a read is about to be posted for: they hold another prompt by then, the fence
    refuses them, and they come anew.
    """
    scenario = alone
    for _ in range(5 if scenario.full else 1):
        scenario.order(P, "lose_renewal", times=99)
        scenario.order(D, "data_posted_late", after_s=LATE_S)
        already = scenario.done(D, "data_posted_late")
        stream = scenario.ask("long-2")
        await scenario.until(
            lambda n=already: scenario.done(D, "data_posted_late") > n, 20, "a read waits"
        )
        due = time.monotonic() + LATE_S
        async with calls(scenario, P) as (prefill, _), AsyncExitStack() as others:
            left = NUM_BLOCKS - len(stream.case.prompt) // BLOCK
            for i, num_blocks in enumerate((40, left - 40, 10)):  # the last waits for a lease's end
                await others.enter_async_context(
                    leased(scenario, prefill, f"other-{i}", num_blocks)
                )
            struck(time.monotonic() < due, "its blocks have another owner before they are read")
            await asyncio.sleep(due - time.monotonic() + 0.2)
        scenario.lift(P)
        scenario.lift(D)
        await scenario.all_whole([stream])
    scenario.note(f"stale blocks refused: {scenario.moved(D, 'kv_stale_reads_total'):g}")
    scenario.moved(P, "kv_leases_expired_total")
    await scenario.finish(rest_s=LEASE_TTL_S + 10)


# -- prefix hits -----------------------------------------------------------------------------------


async def test_prefix_hits_of_0_part_and_all(alone: Scenario) -> None:
    """What is there is not moved again, on either worker, and the answers are the same."""
    scenario = alone
    salt = fresh_salt()
    whole = (512 - 1) // BLOCK

    async def pulled(case: str) -> tuple[int, int]:
        """(blocks that moved, prompt tokens that the prefill worker computed) for this request."""
        before = (
            scenario.samples(D)["kv_transfer_blocks_total"],
            scenario.samples(P)["prompt_tokens_total"],
        )
        await scenario.all_whole([scenario.ask(case, salt=salt)])
        after = (
            scenario.samples(D)["kv_transfer_blocks_total"],
            scenario.samples(P)["prompt_tokens_total"],
        )
        return int(after[0] - before[0]), int(after[1] - before[1])

    assert await pulled("edge-512") == (whole, whole * BLOCK), "nothing is known"
    assert await pulled("edge-512") == (0, 0), "all is here"
    blocks, tokens = await pulled("long-0")
    assert blocks == (832 - 1) // BLOCK - 512 // BLOCK, "the first 512 tokens are here"
    assert tokens <= 832 - whole * BLOCK, "and there but for a block"
    scenario.kill(D)
    await scenario.whole()
    assert await pulled("edge-512") == (whole, 0), "the prefill worker still has it all"
    await scenario.finish()


async def test_prompts_of_an_exact_multiple_of_the_block_size(alone: Scenario) -> None:
    """Around every border, new and known, alone and together."""
    scenario = alone
    edges = [f"edge-{n}" for n in (1, 15, 16, 17, 32, 33, 512, 513)]
    for _ in range(5 if scenario.full else 1):
        salt = fresh_salt()
        for case in edges:
            await scenario.all_whole([scenario.ask(case, salt=salt)])
        await scenario.all_whole([scenario.ask(case, salt=salt) for case in edges])
        await scenario.all_whole([scenario.ask(case) for case in edges])
        same = fresh_salt()
        await scenario.all_whole([scenario.ask(case, salt=same) for case in (*edges, *edges)])
    await scenario.finish()
