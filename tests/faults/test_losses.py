"""No worker left of a pool, and a coordinator lost in mid-stream."""

from __future__ import annotations

import asyncio
import time

import pytest

from coordinator.client import AsyncClient
from engine.base.errors import Unavailable
from tests.faults.oracle import CASES
from tests.faults.scenario import KILL_S, Scenario, fresh_salt, struck
from tests.faults.streams import Stream, send_by_client

pytestmark = pytest.mark.timeout(600)
MIXED = ("short-0", "short-1-sampled", "json-0", "two-json-sampled", "four-0-sampled")
SHORT = ("short-0", "short-1", "short-0-sampled", "short-1-sampled")


async def test_all_p_dead(scenario: Scenario) -> None:
    """Decode workers compute prompts themselves, slower; clients do not see the pool
    come and go.
    """
    cases = ("long-0", "long-1-sampled") if scenario.full else ("long-2", "long-2-sampled")
    for name in scenario.cluster.prefill:
        scenario.order(name, "late_ready", times=99, after_s=2.0)
    streams = [scenario.ask(case) for case in cases]
    await scenario.servers(streams, scenario.cluster.prefill)
    await scenario.take_down(scenario.cluster.prefill)
    for name in scenario.cluster.prefill:
        scenario.lift(name)
    streams += [scenario.ask(case) for case in ("short-0-sampled", "long-2")]
    await scenario.all_whole(streams)
    assert (
        sum(scenario.rise(name, "prompt_tokens_total") for name in scenario.cluster.decode) >= 500
    )
    scenario.moved(scenario.front, "migrations_total{outcome=retried}")
    await scenario.bring_back(scenario.cluster.prefill)
    await scenario.finish()


async def test_all_d_dead(alone: Scenario) -> None:
    """After --worker-wait-s the caller gets UNAVAILABLE, with as many tokens as it has received,
    and a time to come back; with `resume` it goes on where it was.
    """
    scenario = alone
    async with scenario.spare_front() as front:
        streams = [scenario.ask(case, front=front) for case in SHORT]
        for stream in streams:
            await stream.wait_for_tokens(10)
        await scenario.take_down(scenario.cluster.decode)
        down = time.monotonic()
        late = scenario.ask("short-2", front=front)
        await asyncio.sleep(0.2)  # what was written to its end arrives
        hit = [stream for stream in streams if not stream.is_over or stream.error]
        struck(bool(hit), "not all were over before")
        for stream in [*hit, late]:
            await stream.wait_for_end(20)
            error = stream.api_error
            assert isinstance(error, Unavailable), f"{stream}: {stream.error!r}"
            assert error.num_emitted == len(stream.tokens)
            assert error.retry_after_s > 0
            stream.check_so_far(scenario.oracle)
            assert stream.ended_s - down < 2.0 + 5.0, "it waits for --worker-wait-s and no longer"
        scenario.moved(front, "migrations_total{outcome=exhausted}", at_least=len(hit))
        scenario.moved(front, "request_failures_total{code=unavailable}", at_least=len(hit) + 1)
        await scenario.bring_back(scenario.cluster.decode)
        rest = [scenario.ask(s.case, front=front, resume=s.choices) for s in hit]
        await scenario.all_whole([*rest, *(s for s in streams if s not in hit)])
    await scenario.finish()


async def test_kill_9_of_the_coordinator_in_mid_stream(scenario: Scenario) -> None:
    """The client library goes on at another coordinator with `resume`: its caller sees one stream.

    Workers notice that the calls' owner is gone and free everything.
    """
    for round_ in range(5 if scenario.full else 1):
        dead, alive = (scenario.cluster.coordinators[i] for i in (round_ % 2, 1 - round_ % 2))
        await scenario.move_load(alive)
        addresses = ",".join(scenario.cluster.address(name) for name in (dead, alive))
        async with AsyncClient(addresses) as client:
            streams = [send_by_client(client, CASES[name], salt=fresh_salt()) for name in MIXED]
            for stream in streams:
                await stream.wait_for_tokens(10)
            written = [stream for stream in streams if not stream.is_over]
            running = scenario.samples(dead).get("num_requests_running", 0)
            struck(running >= 1, "the dying coordinator has them")
            killed = scenario.kill(dead)
            await scenario.all_whole(streams)
            assert client.num_resumed >= 1
        scenario.in_time([s.wait_after(killed) for s in written], KILL_S)
        stayed = sum(len(_writers(scenario, stream)) == 1 for stream in written)
        scenario.note(f"{stayed} of {len(written)} went on at the worker that has their blocks")
        await scenario.whole()
    await scenario.finish()


def _writers(scenario: Scenario, stream: Stream) -> set[str]:
    """Decode workers that wrote to an answer."""
    return {
        name
        for name in scenario.cluster.decode
        for line in scenario.cluster.log_lines(name, scenario.log_mark(name))
        if line["event"] == "decode ended" and line.get("request_id") == stream.request_id
    }
