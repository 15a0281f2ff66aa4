"""Workers that are there and compute wrongly: a pause for some, not one wrong token."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.scenario import Scenario, fresh_salt, struck
from tests.support.cluster import NATIVE
from worker.exit_status import SICK

pytestmark = pytest.mark.timeout(600)
SHORT = ("short-0", "short-1", "short-0-sampled", "short-1-sampled")
FOR_EVER = 10**9


async def anew(scenario: Scenario, names: Sequence[str]) -> None:
    """End workers that others avoid from now on, so that the next scenario has a whole cluster."""
    for name in names:
        scenario.lift(name)
        if scenario.cluster[name].alive:
            scenario.kill(name)
    await scenario.whole()


async def test_a_decode_worker_whose_logits_become_nan(alone: Scenario) -> None:
    """It ends, and its requests go on at the healthy one with the same tokens."""
    scenario = alone
    victim = scenario.cluster.decode[0]
    await scenario.all_trusted()
    streams = [scenario.ask(case) for case in SHORT * (10 if scenario.full else 4)]
    for stream in streams[:4]:
        await stream.wait_for_tokens(5)
    ends = scenario.cluster[victim].ends
    num_before = len(ends)  # earlier scenarios ended processes here
    scenario.cluster[victim].wanted = True
    scenario.order(victim, "nan_logits", times=FOR_EVER)
    await scenario.until(lambda: len(ends) > num_before, 30, "the sick worker ends")
    scenario.lift(victim)
    await scenario.all_whole(streams)
    assert ends[num_before].status == SICK
    scenario.moved(scenario.cluster.coordinators, f"sick_workers_total{{worker={victim}}}")
    scenario.moved(scenario.front, "migrations_total{outcome=resumed}")
    await anew(scenario, [victim])
    await scenario.finish()


async def test_a_decode_worker_whose_logits_are_nan_once(alone: Scenario) -> None:
    """Its self-test passes: it lives, and is the last choice for a while."""
    scenario = alone
    victim = scenario.cluster.decode[0]
    await scenario.all_trusted()
    streams = [scenario.ask(case) for case in SHORT]
    for stream in streams:
        await stream.wait_for_tokens(5)
    before = scenario.done(victim, "nan_logits")
    scenario.order(victim, "nan_logits", times=1)
    await scenario.all_whole(streams)
    struck(scenario.done(victim, "nan_logits") > before, "a step was under way")
    scenario.moved(victim, "non_finite_requests_total")
    scenario.moved(victim, "self_tests_total{outcome=passed}")
    assert scenario.cluster[victim].alive
    await anew(scenario, [victim])
    await scenario.finish()


@pytest.mark.parametrize("layer", [3, -1])
async def test_a_prefill_worker_whose_kv_is_nan(alone: Scenario, layer: int) -> None:
    """In its last layer it finds that itself, before a block is announced. What is damaged later is
    found by its reader, which drops all that came from there: the same prompt is computed anew.
    """
    scenario = alone
    await scenario.all_trusted()
    before = {name: scenario.done(name, "nan_kv") for name in scenario.cluster.prefill}
    for name in scenario.cluster.prefill:
        scenario.order(name, "nan_kv", times=1, layer=layer)
    salt = fresh_salt()
    streams = [scenario.ask(case, salt=salt) for case in SHORT]
    await scenario.all_whole(streams)
    hit = [name for name, times in before.items() if scenario.done(name, "nan_kv") > times]
    struck(bool(hit), "a prefill worker computed one of them")
    scenario.moved(scenario.cluster.workers, "non_finite_requests_total")
    await scenario.all_whole([scenario.ask(case, salt=salt) for case in SHORT])
    await anew(scenario, scenario.cluster.workers)
    await scenario.finish()


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_self_test_that_fails_at_the_start(tmp_path: Path, role: str) -> None:
    """The worker ends before it listens, with a status of its own and a sentence."""
    orders = tmp_path / "orders"
    orders.write_text(json.dumps({"nan_logits": {"id": 1, "times": FOR_EVER}}))
    flags = () if NATIVE else ("--dtype", "float32")
    command = [
        sys.executable,
        "-m",
        "tests.faults.fault_injection",
        "--orders",
        str(orders),
        role,
        "start",
    ]
    command += ["--coordinator", "127.0.0.1:1", "--kv-cache-memory", "128MiB", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == SICK
    assert done.stderr.splitlines()[-1].startswith(f"{role}: the self-test of the model failed: ")
    assert "worker serves" not in done.stderr
