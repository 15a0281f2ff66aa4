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
from tests.faults.asks import Stream
from tests.faults.bench import Bench
from tests.faults.leases import calls, leased
from tests.faults.scenario import Scenario, TooLate, fresh_salt, struck
from tests.support.cluster import NUM_BLOCKS, Cluster
from tests.support.timeouts import LEASE_TTL_S

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("one_pair")]

P, D = "prefill-0", "decode-0"
FREE_S = 1.0  # for everything that a cancelled request held
BLOCK = 16
LATE_S = LEASE_TTL_S + 1.5  # before the bench's --pull-timeout-s is over


@pytest.fixture(scope="module")
def one_pair(bench: Bench) -> Iterator[None]:
    """The spares are away."""
    cluster, spares = bench.cluster, ("prefill-1", "decode-1")
    _hold(cluster, spares)
    yield
    for name in spares:
        cluster[name].held = False
    cluster.until_whole()


def _hold(cluster: Cluster, names: tuple[str, ...]) -> None:
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
    row = alone
    await row.take_down([D])
    streams = [row.ask(case) for case in ("long-0", "short-0-sampled")]
    await row.until(
        lambda: row.samples(row.front)["num_requests_waiting"] >= 2, 10, "they are queued"
    )
    await _cancel(row, streams)
    await row.bring_back([D])
    await row.finish()


async def test_cancel_while_prefilling(alone: Scenario) -> None:
    """The prefill worker is in mid-prompt, the decode worker has its room reserved."""
    row = alone
    row.order(P, "late_ready", times=99, after_s=2.0)
    streams = [row.ask(case) for case in ("long-0", "long-1-sampled")]
    for stream in streams:
        await row.server_of(stream, [P])
    await _cancel(row, streams)
    row.lift(P)
    await row.finish()


async def test_cancel_with_a_chunk_in_flight(alone: Scenario) -> None:
    """A read into its blocks is under way: they are free when the read has ended, not before."""
    row = alone
    row.order(D, "data_ends_late", times=99, after_s=0.4)
    already = row.done(D, "data_ends_late")
    streams = [row.ask(case) for case in ("long-0", "long-1-sampled")]
    await row.until(lambda: row.done(D, "data_ends_late") > already, 20, "a read is under way")
    await _cancel(row, streams)
    row.lift(D)
    await row.finish()


async def test_cancel_while_queued_for_decode(alone: Scenario) -> None:
    """It waits in the decode worker for room that others have; they are not disturbed."""
    row = alone
    row.order(D, "data_ends_late", times=2, after_s=2.0)
    first = [row.ask(case) for case in ("long-0", "long-1-sampled")]
    await row.until(lambda: checks.num_held(row.cluster.http(D)) > 100, 10, "the pool is full")
    queued = row.ask("long-1-sampled")
    await row.until(
        lambda: row.samples(D)["num_requests_waiting"] >= 1, 10, "the third waits for room"
    )
    await queued.cancel()
    cancelled = time.monotonic()
    await row.until(
        lambda: queued.request_id not in row.holds(D), FREE_S, "it is not queued any more"
    )
    row.note(f"forgotten after {time.monotonic() - cancelled:.2f} s")
    row.lift(D)
    await row.all_whole(first)
    await row.finish()


async def test_cancel_while_decoding(alone: Scenario) -> None:
    """In mid-answer."""
    row = alone
    for _ in range(20 if row.full else 1):
        streams = [row.ask(case) for case in ("short-0", "json-0-sampled", "four-0-sampled")]
        for stream in streams:
            await stream.come(5)
        await _cancel(row, streams)
    await row.finish()


async def _cancel(row: Scenario, streams: list[Stream]) -> None:
    """Cancel all and time until no block, lease or call is left on either worker."""
    await asyncio.gather(*(stream.cancel() for stream in streams))
    cancelled = time.monotonic()
    while left := await asyncio.to_thread(checks.unrest, row.cluster):
        if time.monotonic() >= cancelled + FREE_S:
            raise TooLate(f"after {FREE_S:g} s still: {left}")
        await asyncio.sleep(0.01)
    row.note(f"all free after {time.monotonic() - cancelled:.2f} s (bound {FREE_S:g} s)")
    for stream in streams:
        stream.check_so_far(row.oracle)


# -- full pools ------------------------------------------------------------------------------------


async def test_d_full_in_mid_transfer(alone: Scenario) -> None:
    """While a long prompt's blocks arrive, the answers beside it use up the rest of the pool: the
    youngest of them gives way, and the transfer goes on.
    """
    row = alone
    for _ in range(5 if row.full else 1):
        long = row.ask("long-0")
        row.order(P, "late_ready", times=3, after_s=1.5, only=long.request_id)
        await row.until(lambda: checks.num_held(row.cluster.http(D)) > 50, 10, "it has its room")
        # Seven answers begin with 5 blocks each and end with 14: beside the prompt's 53 too many.
        streams = [row.ask(f"short-2{'-sampled' if i % 2 else ''}") for i in range(7)]
        await row.all_whole([*streams, long])
        row.lift(P)
    row.moved(D, "num_preemptions_total")
    await row.finish()


async def test_preemption_after_transfer(alone: Scenario) -> None:
    """Two long answers outgrow the pool: the younger gives up blocks that it has just fetched, and
    comes back as a prefix hit.
    """
    row = alone
    for _ in range(5 if row.full else 1):
        streams = [row.ask(case) for case in ("long-0", "long-1-sampled")]
        await row.all_whole(streams)
    row.moved(D, "num_preemptions_total")
    await row.finish()


# -- blocks that are not what they were -----------------------------------------------------------


async def test_a_lease_that_ends_before_its_blocks_are_read(alone: Scenario) -> None:
    """No renewal arrives, the pool is full of others' blocks, and the first blocks to become free
    are those that a read is about to be posted for: they hold another prompt by then, the fence
    refuses them, and they come anew.
    """
    row = alone
    for _ in range(5 if row.full else 1):
        row.order(P, "lose_renewal", times=99)
        row.order(D, "data_posted_late", after_s=LATE_S)
        already = row.done(D, "data_posted_late")
        stream = row.ask("long-2")
        await row.until(lambda n=already: row.done(D, "data_posted_late") > n, 20, "a read waits")
        due = time.monotonic() + LATE_S
        async with calls(row, P) as (prefill, _), AsyncExitStack() as others:
            left = NUM_BLOCKS - len(stream.case.prompt) // BLOCK
            for i, num_blocks in enumerate((40, left - 40, 10)):  # the last waits for a lease's end
                await others.enter_async_context(leased(row, prefill, f"other-{i}", num_blocks))
            struck(time.monotonic() < due, "its blocks have another owner before they are read")
            await asyncio.sleep(due - time.monotonic() + 0.2)
        row.lift(P)
        row.lift(D)
        await row.all_whole([stream])
    row.note(f"stale blocks refused: {row.moved(D, 'kv_stale_reads_total'):g}")
    row.moved(P, "kv_leases_expired_total")
    await row.finish(rest_s=LEASE_TTL_S + 10)


# -- prefix hits -----------------------------------------------------------------------------------


async def test_prefix_hits_of_0_part_and_all(alone: Scenario) -> None:
    """What is there is not moved again, on either worker, and the answers are the same."""
    row = alone
    salt = fresh_salt()
    whole = (512 - 1) // BLOCK

    async def pulled(case: str) -> tuple[int, int]:
        """(blocks that moved, prompt tokens that the prefill worker computed) for this request."""
        before = row.samples(D)["kv_transfer_blocks_total"], row.samples(P)["prompt_tokens_total"]
        await row.all_whole([row.ask(case, salt=salt)])
        after = row.samples(D)["kv_transfer_blocks_total"], row.samples(P)["prompt_tokens_total"]
        return int(after[0] - before[0]), int(after[1] - before[1])

    assert await pulled("edge-512") == (whole, whole * BLOCK), "nothing is known"
    assert await pulled("edge-512") == (0, 0), "all is here"
    blocks, tokens = await pulled("long-0")
    assert blocks == (832 - 1) // BLOCK - 512 // BLOCK, "the first 512 tokens are here"
    assert tokens <= 832 - whole * BLOCK, "and there but for a block"
    row.kill(D)
    await row.whole()
    assert await pulled("edge-512") == (whole, 0), "the prefill worker still has it all"
    await row.finish()


async def test_prompts_of_an_exact_multiple_of_the_block_size(alone: Scenario) -> None:
    """Around every border, new and known, alone and together."""
    row = alone
    edges = [f"edge-{n}" for n in (1, 15, 16, 17, 32, 33, 512, 513)]
    for _ in range(5 if row.full else 1):
        salt = fresh_salt()
        for case in edges:
            await row.all_whole([row.ask(case, salt=salt)])
        await row.all_whole([row.ask(case, salt=salt) for case in edges])
        await row.all_whole([row.ask(case) for case in edges])
        same = fresh_salt()
        await row.all_whole([row.ask(case, salt=same) for case in (*edges, *edges)])
    await row.finish()
