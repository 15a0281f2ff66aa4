"""One request cannot harm another: attacks of one request, or the few that make one, against
ordinary answers of other callers on 2 + 2 workers (tests/faults/isolation).

While each runs, the others' p99 between tokens stays within twice the undisturbed one, measured
side by side; their tokens are the undisturbed ones; memory is bounded; /health answers within a
second; each request of an attack has a documented end. Afterwards nothing is held, nothing
computes, all processes are the same, and no log has a traceback. At the end SIGTERM ends the stack
amid attacks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from tests.faults.isolation import attack
from tests.faults.isolation.attacked_stack import DRAIN_S, AttackedStack
from tests.faults.isolation.scenarios import SIGTERM_AMID, Scenario, looping_model, refused, rows_of
from tests.faults.isolation.windows import FULL, SHORT
from tests.faults.scenario import NOTES

REFUSAL_S = 1.0
pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttackedStack]:
    folder = tmp_path_factory.mktemp("isolation")
    model = looping_model(folder / "smollm2.gguf")
    with AttackedStack(folder, "--model", str(model), "--model-name", "smollm2") as ready:
        yield ready


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """In the full form each scenario is a row, in the shortened one each group of them."""
    if "scenarios" in metafunc.fixturenames:
        rows = rows_of(full=metafunc.config.getoption("--full", default=False))
        ids = [name.replace(" ", "-") for name in rows]
        metafunc.parametrize("scenarios", rows.values(), ids=ids)


def test_one_request_harms_no_other(
    attacked: AttackedStack, scenarios: list[Scenario], full: bool, request: pytest.FixtureRequest
) -> None:
    NOTES[request.node.name] = attacked.check(scenarios, FULL if full else SHORT)


def test_refusals_are_quick_while_all_places_are_taken(attacked: AttackedStack) -> None:
    """Each names a time to come back; it takes what a new connection takes."""
    ends = attacked.send(partial(refused, num_places=256, num=100))
    assert {end.code for end in ends} == {"RESOURCE_EXHAUSTED"}, str(ends[0])
    seconds = sorted(end.seconds for end in ends)
    NOTES["refusals"] = [f"p50 {1000 * seconds[50]:.0f} ms, the slowest {1000 * seconds[-1]:.0f}"]
    assert seconds[-1] < REFUSAL_S
    attacked.stack.assert_at_rest(20)


def test_sigterm_ends_the_stack_amid_attacks(attacked: AttackedStack) -> None:
    stack = attacked.stack
    target = attack.Target(stack.address, stack.http_address)
    callers = [threading.Thread(target=send, args=(target,), daemon=True) for send in SIGTERM_AMID]
    for caller in callers:
        caller.start()
    time.sleep(1.0)
    stack.process.terminate()
    begun_s = time.monotonic()
    stack.process.wait(DRAIN_S + 10)
    assert not stack.pids(), "a process is left"
    NOTES["sigterm"] = [f"the stack has ended after {time.monotonic() - begun_s:.1f} s"]
