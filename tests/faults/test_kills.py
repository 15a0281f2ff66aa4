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


def _rounds(scenario: Scenario, full: int) -> range:
    return range(full if scenario.full else 1)


async def test_kill_9_of_p_before_the_first_chunk(scenario: Scenario) -> None:
    """Nothing of the prompt has come over: another prefill worker computes it as if it were new."""
    for _ in _rounds(scenario, 5):
        for name in scenario.cluster.prefill:
            scenario.order(name, "late_ready", times=99, after_s=2.0)
        victim, hit, streams = await scenario.spread(LONG, scenario.cluster.prefill)
        killed = scenario.kill(victim)
        for name in scenario.cluster.prefill:
            scenario.lift(name)
        await scenario.all_whole(streams)
        scenario.in_time([s.wait_after(killed) for s in hit], scenario.first_token_bound(KILL_S))
        scenario.moved(scenario.front, "migrations_total")
        await scenario.whole()
    await scenario.finish()


async def test_kill_9_of_p_during_a_read(scenario: Scenario) -> None:
    """The memory that is read from goes away under the read: what came before is kept, that read
    is not, and the rest comes from elsewhere.
    """
    for _ in _rounds(scenario, 10):
        workers = scenario.cluster.rows()
        pids = {workers[p].incarnation: scenario.cluster[p].pid for p in scenario.cluster.prefill}
        scenario.order("decode-0", "kill_in_data", pids=pids, min_bytes=CHUNK_BYTES)
        for name in scenario.cluster.prefill:
            scenario.cluster[name].wanted = True
        already = scenario.done("decode-0", "kill_in_data")
        streams = [scenario.ask(case) for case in LONG]
        await scenario.until(
            lambda n=already: scenario.done("decode-0", "kill_in_data") > n, 30, "a read is hit"
        )
        killed = time.monotonic()
        scenario.lift("decode-0")
        await scenario.all_whole(streams)
        scenario.in_time(
            [s.wait_after(killed) for s in streams], scenario.first_token_bound(KILL_S)
        )
        await scenario.whole()
    for name in scenario.cluster.prefill:
        scenario.cluster[name].wanted = False
    await scenario.finish()


async def test_kill_9_of_p_after_the_last_chunk_before_the_first_token(scenario: Scenario) -> None:
    """The blocks are here and fenced: a dead prefill worker is not missed."""
    for _ in _rounds(scenario, 5):
        for name in scenario.cluster.decode:
            scenario.order(name, "hold_intake", times=99, at_most_s=20.0, min_blocks=16)
        victim, hit, streams = await scenario.spread(LONG[::2], scenario.cluster.prefill)
        wanted = {stream.request_id for stream in hit}

        def computed(name: str = victim, ids: set[str] = wanted) -> bool:
            lines = scenario.cluster.log_lines(name)
            return ids <= {x.get("request_id") for x in lines if x["event"] == "prefill ended"}

        await scenario.until(computed, 20, "its leases are over")
        killed = scenario.kill(victim)
        struck(not any(stream.tokens for stream in hit), "no token is written yet")
        for name in scenario.cluster.decode:
            scenario.lift(name)
        await scenario.all_whole(streams)
        scenario.in_time([s.wait_after(killed) for s in hit], KILL_S)
        await scenario.whole()
    await scenario.finish()


async def test_kill_9_of_d_during_a_read(scenario: Scenario) -> None:
    """Half a chunk is in the dead worker's memory: it is not needed, the prefill worker still has
    the blocks, and its leases to the dead one end by themselves.
    """
    for _ in _rounds(scenario, 10):
        scenario.order("decode-0", "kill_in_data", min_bytes=CHUNK_BYTES)
        scenario.cluster["decode-0"].wanted = True
        streams = [scenario.ask(case) for case in LONG]
        pid = scenario.cluster["decode-0"].pid
        await scenario.until(
            lambda p=pid: _gone(scenario, "decode-0", p), 30, "it kills itself in a read"
        )
        killed = time.monotonic()
        scenario.lift("decode-0")
        await scenario.all_whole(streams)
        scenario.in_time(
            [s.wait_after(killed) for s in streams], scenario.first_token_bound(KILL_S)
        )
        scenario.moved(scenario.front, "migrations_total")
        await scenario.whole()
    scenario.cluster["decode-0"].wanted = False
    await scenario.finish()


async def test_kill_9_of_d_in_mid_decode(scenario: Scenario) -> None:
    """Another decode worker goes on with the next token: none is doubled, missing or different."""
    for _ in _rounds(scenario, 10):
        victim, hit, streams = await scenario.spread(SHORT, scenario.cluster.decode, tokens=10)
        killed = scenario.kill(victim)
        struck(any(not stream.is_over for stream in hit), "they were in mid-answer")
        await scenario.all_whole(streams)
        scenario.in_time([s.wait_after(killed) for s in hit if s.ended_s > killed], KILL_S)
        scenario.moved(scenario.front, "migrations_total{outcome=resumed}")
        await scenario.whole()
    await scenario.finish()


async def test_kill_9_of_d_in_mid_form_and_with_choices(scenario: Scenario) -> None:
    """Answers that are held to a grammar go on in the middle of it, and each choice of several
    where that one was.
    """
    for _ in _rounds(scenario, 10):
        victim, hit, streams = await scenario.spread(FORMS, scenario.cluster.decode, tokens=8)
        killed = scenario.kill(victim)
        struck(any(not stream.is_over for stream in hit), "they were in mid-answer")
        await scenario.all_whole(streams)
        scenario.in_time([s.wait_after(killed) for s in hit if s.ended_s > killed], KILL_S)
        scenario.moved(scenario.front, "migrations_total{outcome=resumed}")
        await scenario.whole()
    await scenario.finish()


async def test_kill_9_of_p_under_choices(scenario: Scenario) -> None:
    """Three answers wait for one prompt: its blocks are taken up elsewhere, once."""
    for _ in _rounds(scenario, 5):
        for name in scenario.cluster.prefill:
            scenario.order(name, "late_ready", times=99, after_s=1.0)
        victim, hit, streams = await scenario.spread(
            ("three-long-sampled",), scenario.cluster.prefill
        )
        killed = scenario.kill(victim)
        for name in scenario.cluster.prefill:
            scenario.lift(name)
        await scenario.all_whole(streams)
        scenario.in_time([s.wait_after(killed) for s in hit], scenario.first_token_bound(KILL_S))
        await scenario.whole()
    await scenario.finish()


async def test_kill_9_of_d_with_16_streams(scenario: Scenario) -> None:
    """All its answers go on on the one that is left, in a pool that is too small for all."""
    for _ in _rounds(scenario, 5):
        cases = [f"short-{i % 3}{'-sampled' if i % 2 else ''}" for i in range(16)]
        victim, hit, streams = await scenario.spread(cases, scenario.cluster.decode, tokens=5)
        killed = scenario.kill(victim)
        await scenario.all_whole(streams)
        struck(len(hit) >= 4, "many are on it")
        waits = sorted(s.wait_after(killed) for s in hit if s.ended_s > killed)
        # Sixteen answers on one core, and room for nine: the first goes on in time, others queue.
        scenario.in_time(waits[:1], KILL_S)
        scenario.note(f"the last of {len(waits)} answers went on after {waits[-1]:.1f} s")
        scenario.moved(scenario.front, "migrations_total{outcome=resumed}", at_least=2)
        await scenario.whole()
    await scenario.finish()


async def test_restart_on_the_same_port_under_load(scenario: Scenario) -> None:
    """The same place comes back with the same name and address and another memory: no peer reads
    from it what its predecessor announced, and no peer is wedged by it.
    """
    ends = {name: len(scenario.cluster[name].ends) for name in scenario.cluster.workers}
    restarts = Counter[str]()
    while restarts.total() < (50 if scenario.full else 2):
        which = restarts.total() // 2 % 2
        streams = [scenario.ask(case) for case in ("long-2", "long-2-sampled", "short-2-sampled")]
        for name in (f"prefill-{which}", f"decode-{which}"):
            scenario.kill(name)
            restarts[name] += 1
        await scenario.all_whole(streams)
        await scenario.whole()
        addresses = {n: r.address for n, r in scenario.cluster.rows().items()}
        assert all(addresses[n] == scenario.cluster.address(n) for n in scenario.cluster.workers)
    for name in scenario.cluster.workers:
        assert len(scenario.cluster[name].ends) - ends[name] == restarts[name]
    await scenario.finish()


def _gone(scenario: Scenario, name: str, pid: int) -> bool:
    place = scenario.cluster[name]
    return place.process is None or place.process.pid != pid or not place.alive
