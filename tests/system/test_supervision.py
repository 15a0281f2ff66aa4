"""kill -9 of anything on one machine: workers come back and answers go on; without a coordinator
no process stays.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from tests.support.greedy import greedy
from tests.support.paths import ROOT
from tests.support.stack import EXACT, SHARED, SharedStacks, Stack, metrics_of, until
from tests.support.timeouts import Timeouts

LONG = greedy(1500)
SHORT = greedy(128)
SEAM = """import signal, time
signal.signal(signal.SIGUSR2, lambda *_: time.sleep(3600))
"""
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def stack(stacks: SharedStacks) -> Iterator[Stack]:
    """A stack for this module alone, which harms it; its last test ends it."""
    own = stacks.take(*SHARED)
    yield own
    own.stop()


def test_kill_9_of_the_decode_worker_in_mid_answer(stack: Stack) -> None:
    """The only one: the answer waits for it to come back, and goes on with the same tokens."""
    pid = stack.pid_of("decode-0")
    tokens: list[int] = []
    for event in stack.client.generate(SHORT["prompt"], timeout_s=120, max_tokens=64):
        tokens += getattr(event, "token_ids", ())
        if len(tokens) > 10 and pid:
            os.kill(pid, signal.SIGKILL)
            pid = 0
    assert tokens == SHORT["tokens"]
    assert stack.pid_of("decode-0") > 0
    stack.assert_at_rest()


def test_kill_9_of_the_prefill_worker_while_it_computes(stack: Stack) -> None:
    answers: list[list[int]] = []
    prompt = LONG["prompt"]
    thread = threading.Thread(
        target=lambda: answers.append(stack.generate(prompt, max_tokens=16, cache_salt="new")[0])
    )
    thread.start()
    until(lambda: bool(stack.workers("prefill")[0].num_running), 20, "the prompt is being computed")
    os.kill(stack.pid_of("prefill-0"), signal.SIGKILL)
    thread.join(120)
    assert answers == [LONG["tokens"][:16]]
    until(stack.ready, 60, "the prefill worker is back")
    stack.assert_at_rest()


def test_requests_between_death_and_return_wait_and_finish(stack: Stack) -> None:
    os.kill(stack.pid_of("decode-0"), signal.SIGKILL)
    tokens, _, _ = stack.generate(SHORT["prompt"], max_tokens=32)
    assert tokens == SHORT["tokens"][:32]
    until(stack.ready, 60, "the decode worker is back")
    stack.assert_at_rest()


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose workers may hang: at SIGUSR2 their event loop does. Its last test ends it."""
    folder = tmp_path_factory.mktemp("hanging")
    (folder / "sitecustomize.py").write_text(SEAM)
    flags = (*EXACT, *Timeouts(worker_hang_s=4, worker_wait_s=60).stack_flags)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", f"{folder}:{ROOT}")
        stack = Stack(folder, *flags).start()
    yield stack
    stack.stop()


def hang_in_mid_answer(stack: Stack, number: signal.Signals) -> None:
    """Send a signal to the only decode worker; another one finishes the answer."""
    before = metrics_of(stack.http_address)
    first = stuck = stack.pid_of("decode-0")
    tokens: list[int] = []
    for event in stack.client.generate(SHORT["prompt"], timeout_s=120, max_tokens=64):
        tokens += getattr(event, "token_ids", ())
        if len(tokens) > 10 and stuck:
            os.kill(stuck, number)
            stuck = 0
    assert tokens == SHORT["tokens"]
    assert stack.pid_of("decode-0") != first
    hangs = "diptych_worker_hangs_total"
    assert metrics_of(stack.http_address)[hangs] - before.get(hangs, 0) == 1
    assert "local worker hangs; killing it" in stack.logs()["coordinator"]
    stack.assert_at_rest()


def test_a_worker_whose_event_loop_is_stuck_is_replaced(hanging: Stack) -> None:
    """Though a thread of it reports the stall."""
    hang_in_mid_answer(hanging, signal.SIGUSR2)
    assert metrics_of(hanging.http_address)["diptych_worker_stalls_total"] == 1
    log = hanging.logs()["coordinator"]
    assert log.index("a worker's event loop stalls") < log.index("local worker hangs")
    assert "has sent nothing" not in log, "its stream was kept until it was killed"


def test_a_stopped_worker_is_replaced(hanging: Stack) -> None:
    """SIGSTOP of the only decode worker in mid-answer: it is killed, and the answer goes on."""
    hang_in_mid_answer(hanging, signal.SIGSTOP)


def test_sigterm_ends_everything_with_status_0(hanging: Stack) -> None:
    hanging.generate(SHORT["prompt"], max_tokens=4)
    hanging.process.send_signal(signal.SIGTERM)
    assert hanging.process.wait(20) == 0
    assert not hanging.pids()
    assert "Traceback" not in "".join(hanging.logs().values())


def test_kill_9_of_the_coordinator_takes_its_workers(stack: Stack) -> None:
    assert len(stack.pids()) == 3
    stack.process.kill()
    stack.process.wait()
    until(lambda: not stack.pids(), 10, "no worker survives its coordinator")
