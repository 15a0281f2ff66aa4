"""kill -9 of a prefill or a decode worker, at every stage of a request. With a spare the next token
comes within 2 s; the answer has no seam.
"""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.faults.scenario import KILL_S, LONG, Scenario, struck

pytestmark = pytest.mark.timeout(600)

SHORT = ("short-0", "short-1", "short-0-sampled", "short-1-sampled")
FORMS = ("json-0", "json-0-sampled", "regex-0-sampled", "two-json-sampled", "four-0-sampled")
CHUNK_BYTES = 1 << 20  # a read of a prompt's chunk, not of a bystander's few blocks


def _rounds(row: Scenario, full: int) -> range:
    return range(full if row.full else 1)


async def test_kill_9_of_p_before_the_first_chunk(row: Scenario) -> None:
    """Nothing of the prompt has come over: another prefill worker computes it as if it were new."""
    for _ in _rounds(row, 5):
        for name in row.cluster.prefill:
            row.order(name, "late_ready", times=99, after_s=2.0)
        victim, hit, streams = await row.spread(LONG, row.cluster.prefill)
        killed = row.kill(victim)
        for name in row.cluster.prefill:
            row.lift(name)
        await row.all_whole(streams)
        row.in_time([s.wait_after(killed) for s in hit], row.first_token_bound(KILL_S))
        row.moved(row.front, "migrations_total")
        await row.whole()
    await row.finish()


async def test_kill_9_of_p_during_a_read(row: Scenario) -> None:
    """The memory that is read from goes away under the read: what came before is kept, that read
    is not, and the rest comes from elsewhere.
    """
    for _ in _rounds(row, 10):
        rows = row.cluster.rows()
        pids = {rows[p].incarnation: row.cluster[p].pid for p in row.cluster.prefill}
        row.order("decode-0", "kill_in_data", pids=pids, min_bytes=CHUNK_BYTES)
        for name in row.cluster.prefill:
            row.cluster[name].wanted = True
        already = row.done("decode-0", "kill_in_data")
        streams = [row.ask(case) for case in LONG]
        await row.until(
            lambda n=already: row.done("decode-0", "kill_in_data") > n, 30, "a read is hit"
        )
        killed = time.monotonic()
        row.lift("decode-0")
        await row.all_whole(streams)
        row.in_time([s.wait_after(killed) for s in streams], row.first_token_bound(KILL_S))
        await row.whole()
    for name in row.cluster.prefill:
        row.cluster[name].wanted = False
    await row.finish()


async def test_kill_9_of_p_after_the_last_chunk_before_the_first_token(row: Scenario) -> None:
    """The blocks are here and fenced: a dead prefill worker is not missed."""
    for _ in _rounds(row, 5):
        for name in row.cluster.decode:
            row.order(name, "hold_intake", times=99, at_most_s=20.0, min_blocks=16)
        victim, hit, streams = await row.spread(LONG[::2], row.cluster.prefill)
        wanted = {stream.request_id for stream in hit}

        def computed(name: str = victim, ids: set[str] = wanted) -> bool:
            lines = row.cluster.log_lines(name)
            return ids <= {x.get("request_id") for x in lines if x["event"] == "prefill ended"}

        await row.until(computed, 20, "its leases are over")
        killed = row.kill(victim)
        struck(not any(stream.tokens for stream in hit), "no token is written yet")
        for name in row.cluster.decode:
            row.lift(name)
        await row.all_whole(streams)
        row.in_time([s.wait_after(killed) for s in hit], KILL_S)
        await row.whole()
    await row.finish()


async def test_kill_9_of_d_during_a_read(row: Scenario) -> None:
    """Half a chunk is in the dead worker's memory: nobody needs it, the prefill worker still has
    the blocks, and its leases to the dead one end by themselves.
    """
    for _ in _rounds(row, 10):
        row.order("decode-0", "kill_in_data", min_bytes=CHUNK_BYTES)
        row.cluster["decode-0"].wanted = True
        streams = [row.ask(case) for case in LONG]
        pid = row.cluster["decode-0"].pid
        await row.until(lambda p=pid: _gone(row, "decode-0", p), 30, "it kills itself in a read")
        killed = time.monotonic()
        row.lift("decode-0")
        await row.all_whole(streams)
        row.in_time([s.wait_after(killed) for s in streams], row.first_token_bound(KILL_S))
        row.moved(row.front, "migrations_total")
        await row.whole()
    row.cluster["decode-0"].wanted = False
    await row.finish()


async def test_kill_9_of_d_in_mid_decode(row: Scenario) -> None:
    """Another decode worker goes on with the next token: none is doubled, missing or different."""
    for _ in _rounds(row, 10):
        victim, hit, streams = await row.spread(SHORT, row.cluster.decode, tokens=10)
        killed = row.kill(victim)
        struck(any(not stream.over for stream in hit), "they were in mid-answer")
        await row.all_whole(streams)
        row.in_time([s.wait_after(killed) for s in hit if s.ended_s > killed], KILL_S)
        row.moved(row.front, "migrations_total{outcome=resumed}")
        await row.whole()
    await row.finish()


async def test_kill_9_of_d_in_mid_form_and_with_choices(row: Scenario) -> None:
    """Answers that are held to a grammar go on in the middle of it, and each choice of several
    where that one was.
    """
    for _ in _rounds(row, 10):
        victim, hit, streams = await row.spread(FORMS, row.cluster.decode, tokens=8)
        killed = row.kill(victim)
        struck(any(not stream.over for stream in hit), "they were in mid-answer")
        await row.all_whole(streams)
        row.in_time([s.wait_after(killed) for s in hit if s.ended_s > killed], KILL_S)
        row.moved(row.front, "migrations_total{outcome=resumed}")
        await row.whole()
    await row.finish()


async def test_kill_9_of_p_under_choices(row: Scenario) -> None:
    """Three answers wait for one prompt: its blocks are taken up elsewhere, once."""
    for _ in _rounds(row, 5):
        for name in row.cluster.prefill:
            row.order(name, "late_ready", times=99, after_s=1.0)
        victim, hit, streams = await row.spread(("three-long-sampled",), row.cluster.prefill)
        killed = row.kill(victim)
        for name in row.cluster.prefill:
            row.lift(name)
        await row.all_whole(streams)
        row.in_time([s.wait_after(killed) for s in hit], row.first_token_bound(KILL_S))
        await row.whole()
    await row.finish()


async def test_kill_9_of_d_with_16_streams(row: Scenario) -> None:
    """All its answers go on on the one that is left, in a pool that is too small for all."""
    for _ in _rounds(row, 5):
        cases = [f"short-{i % 3}{'-sampled' if i % 2 else ''}" for i in range(16)]
        victim, hit, streams = await row.spread(cases, row.cluster.decode, tokens=5)
        killed = row.kill(victim)
        await row.all_whole(streams)
        struck(len(hit) >= 4, "many are on it")
        waits = sorted(s.wait_after(killed) for s in hit if s.ended_s > killed)
        # Sixteen answers on one core, and room for nine: the first goes on in time, others queue.
        row.in_time(waits[:1], KILL_S)
        row.note(f"the last of {len(waits)} answers went on after {waits[-1]:.1f} s")
        row.moved(row.front, "migrations_total{outcome=resumed}", at_least=2)
        await row.whole()
    await row.finish()


async def test_restart_on_the_same_port_under_load(row: Scenario) -> None:
    """The same place comes back with the same name and address and another memory: nobody reads
    from it what its predecessor announced, and no peer is wedged by it.
    """
    ends = {name: len(row.cluster[name].ends) for name in row.cluster.workers}
    restarts = Counter[str]()
    while restarts.total() < (50 if row.full else 2):
        which = restarts.total() // 2 % 2
        streams = [row.ask(case) for case in ("long-2", "long-2-sampled", "short-2-sampled")]
        for name in (f"prefill-{which}", f"decode-{which}"):
            row.kill(name)
            restarts[name] += 1
        await row.all_whole(streams)
        await row.whole()
        addresses = {n: r.address for n, r in row.cluster.rows().items()}
        assert all(addresses[n] == row.cluster.address(n) for n in row.cluster.workers)
    for name in row.cluster.workers:
        assert len(row.cluster[name].ends) - ends[name] == restarts[name]
    await row.finish()


def _gone(row: Scenario, name: str, pid: int) -> bool:
    place = row.cluster[name]
    return place.process is None or place.process.pid != pid or not place.alive
