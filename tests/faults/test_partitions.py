"""Cuts in the network between two processes, in one direction or both, and reads over it that do
not end. With a spare the next token comes within 5 s.

Every process has a network of its own (see `network`), and blocks travel over TCP.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.faults.scenario import LONG, SILENT_S, Scenario
from tests.support.network import Namespaces
from tests.support.timeouts import LEASE_TTL_S

pytestmark = pytest.mark.timeout(600)

SHORT = ("short-0", "short-1", "short-0-sampled", "short-1-sampled")
WAYS = ("there", "back", "both")
# gRPC finds a dead connection within half a minute, and TCP waits longer from try to try.
HEALED_S = 45.0


def _cut(scenario: Scenario, one: str, other: str, way: str) -> float:
    """Cut `one` -> `other` ("there"), the other way ("back"), or both; returns the moment."""
    if way in ("there", "both"):
        scenario.cluster.network.cut(one, other)
    if way in ("back", "both"):
        scenario.cluster.network.cut(other, one)
    return time.monotonic()


async def _healed(scenario: Scenario, cut_s: float) -> None:
    """Keep the cut past the lease, mend it, and see that all find each other again."""
    await asyncio.sleep(max(0.0, cut_s + LEASE_TTL_S + 1.0 - time.monotonic()))
    scenario.cluster.network.heal()
    await scenario.whole(HEALED_S)
    cases = ("long-2", "long-2-sampled") if scenario.full else [f"load-{i}" for i in range(4)]
    await scenario.all_whole([scenario.ask(case) for case in cases])


def _skip_in_short(scenario: Scenario, way: str, shorts: str) -> None:
    if not scenario.full and way != shorts:
        pytest.skip("in the full suite")


@pytest.mark.parametrize("way", WAYS)
async def test_partition_p_d(net_scenario: Scenario, way: str) -> None:
    """A prefill worker and a decode worker cannot reach each other, but both reach the coordinator:
    the decode worker takes another one, and the blocks that an endless read may still write stay
    out of use until it ends.
    """
    scenario = net_scenario
    _skip_in_short(scenario, way, "both")
    streams = [scenario.ask(case) for case in LONG]
    both = (scenario.cluster.prefill, scenario.cluster.decode)
    prefill, decode = await asyncio.gather(*(scenario.servers(streams, pool) for pool in both))
    where = list(zip(prefill, decode, strict=True))
    pair = max(set(where), key=where.count)
    hit = [s for s, at in zip(streams, where, strict=True) if at == pair]
    cut = _cut(scenario, *pair, way)
    await scenario.all_whole(streams)
    waits = [s.wait_after(cut) for s in hit]
    scenario.in_time(waits, scenario.first_token_bound(SILENT_S))
    await _healed(scenario, cut)
    await scenario.finish(rest_s=40)


@pytest.mark.parametrize("way", WAYS)
async def test_partition_c_p(net_scenario: Scenario, way: str) -> None:
    """The coordinator loses sight of a prefill worker that works on: prompts that are with it
    finish there, new ones go elsewhere, and it comes back unaided.
    """
    scenario = net_scenario
    _skip_in_short(scenario, way, "back")
    victim, hit, streams = await scenario.spread(LONG, scenario.cluster.prefill)
    cut = _cut(scenario, scenario.front, victim, way)
    await scenario.all_whole(streams)
    scenario.in_time([s.wait_after(cut) for s in hit], scenario.first_token_bound(SILENT_S))
    if way != "there":  # the way to a worker is not needed to see it
        await scenario.until(
            lambda: scenario.cluster.rows()[victim].state == "suspect", 10, "it is not trusted"
        )
    await scenario.all_whole(
        [scenario.ask(case) for case in (SHORT if scenario.full else SHORT[1:3])]
    )
    await _healed(scenario, cut)
    await scenario.finish(rest_s=40)


@pytest.mark.parametrize("way", WAYS)
async def test_partition_c_d(net_scenario: Scenario, way: str) -> None:
    """The coordinator hears nothing more of a decode worker, or the worker nothing of it: answers
    go on elsewhere, and what the old calls hold is given up.
    """
    scenario = net_scenario
    _skip_in_short(scenario, way, "there")
    victim, hit, streams = await scenario.spread(SHORT, scenario.cluster.decode, tokens=10)
    cut = _cut(scenario, scenario.front, victim, way)
    await scenario.all_whole(streams)
    scenario.in_time([s.wait_after(cut) for s in hit if s.ended_s > cut], SILENT_S)
    await _healed(scenario, cut)
    await scenario.finish(rest_s=40)


async def test_reads_that_never_end(net_scenario: Scenario) -> None:
    """A prefill worker is stopped while its blocks are read over TCP: the read hangs. Its
    destination is quarantined and counted, the answer goes on, and when the worker wakes up or dies
    the blocks are free again.
    """
    scenario = net_scenario
    if not isinstance(scenario.cluster.network, Namespaces):
        pytest.skip("without namespaces blocks travel by memory, which a stopped process serves")
    for _ in range(5 if scenario.full else 1):
        streams = [scenario.ask(case) for case in LONG]
        victim = await scenario.server_of(streams[0], scenario.cluster.prefill)
        await scenario.until(
            lambda: any(_pulled(scenario, n) for n in scenario.cluster.decode),
            20,
            "blocks are moving",
        )
        scenario.cluster[victim].freeze()
        frozen = time.monotonic()
        await scenario.all_whole(streams)
        scenario.in_time(
            [s.wait_after(frozen) for s in streams], scenario.first_token_bound(SILENT_S)
        )
        await asyncio.sleep(max(0.0, frozen + LEASE_TTL_S + 1.0 - time.monotonic()))
        scenario.cluster[victim].thaw()
        await scenario.whole(HEALED_S)
    await scenario.finish(rest_s=40)


def _pulled(scenario: Scenario, name: str) -> bool:
    return scenario.rise(name, "kv_transfer_blocks_total") > 0
