"""Requests that end every worker that computes them, beside innocent ones."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime

import pytest

from coordinator.cluster.incidents import LOST_S
from coordinator.routing.harmed_workers import MAX_HARMED, MOST_HARMED
from engine.base.errors import WorkersLost
from tests.faults.oracle import CASES, Case
from tests.faults.scenario import Scenario

pytestmark = pytest.mark.timeout(900)
POISON = 49_000  # in no text of the oracle
INNOCENT = ("short-0", "short-1-sampled", "long-2", "load-0", "load-1")
FOR_EVER = 10**9
_harmed_s: list[float] = []  # when a request of this module ended a worker, by time.time()


def poisoned(where: str) -> Case:
    """With the token where a prefill worker computes it, or a decode worker alone."""
    case = CASES["short-0"]
    at = 3 if where == "prefill" else len(case.prompt) - 1
    prompt = (*case.prompt[:at], POISON, *case.prompt[at + 1 :])
    return replace(case, name=f"poison-{where}", prompt=prompt)


@pytest.mark.parametrize(("where", "number"), [("decode", 1), ("prefill", 1), ("decode", 3)])
async def test_a_request_that_harms_every_worker_ends_and_the_others_do_not(
    alone: Scenario, where: str, number: int
) -> None:
    """Of several at once each is lost with what it did; workers come back meanwhile."""
    scenario = alone
    await scenario.all_trusted()
    most = MAX_HARMED if number == 1 and _is_calm(scenario) else MOST_HARMED * number
    assert not any(POISON in case.prompt for case in CASES.values())
    before = {name: scenario.done(name, "poison") for name in scenario.cluster.workers}
    num_ends = {name: len(scenario.cluster[name].ends) for name in scenario.cluster.workers}
    for name in scenario.cluster.workers:
        scenario.order(name, "poison", times=FOR_EVER, token=POISON)
    innocent = [scenario.ask(case) for case in INNOCENT]
    for stream in innocent[:2]:
        await stream.wait_for_tokens(3)
    guilty = [scenario.ask(poisoned(where)) for _ in range(number)]
    innocent += [scenario.ask(case) for case in INNOCENT]
    for stream in guilty:
        await stream.wait_for_end(240)
    ends_s = max(stream.ended_s - stream.sent_s for stream in guilty)
    for name in scenario.cluster.workers:
        scenario.lift(name)
    harmed = sum(scenario.done(name, "poison") - was for name, was in before.items())
    scenario.note(f"{where}, {number}: {harmed} workers in {ends_s:.1f} s")
    await scenario.all_whole(innocent, 240)
    for stream in guilty:
        assert isinstance(stream.api_error, WorkersLost), f"{stream}: {stream.error!r}"
        assert not stream.tokens
    _harmed_s.extend([time.time()] * harmed)
    assert harmed <= most
    scenario.moved(scenario.front, "migrations_total{outcome=given_up}", number)
    for name, num in num_ends.items():  # what the poison did is wanted
        ends = scenario.cluster[name].ends
        ends[num:] = [replace(end, wanted=end.wanted or end.status == -9) for end in ends[num:]]
    await scenario.finish()


def _is_calm(scenario: Scenario) -> bool:
    """Whether earlier scenarios have lost too few workers lately to clear a request."""
    since_s = time.time() - LOST_S
    lines = scenario.cluster.log_lines(scenario.front)
    lost = [line for line in lines if line.get("event") == "worker lost"]
    lately = [x for x in lost if datetime.fromisoformat(x["timestamp"]).timestamp() > since_s]
    return len(lately) - sum(at_s > since_s for at_s in _harmed_s) < MAX_HARMED
