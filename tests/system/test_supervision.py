"""kill -9 of anything on one machine: workers come back and answers go on; without a coordinator
no process stays.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.greedy import greedy
from tests.support.stack import EXACT, SHARED, SharedStacks, Stack, metrics_of, until
from tests.support.timeouts import Timeouts

LONG = greedy(1500)
SHORT = greedy(128)
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


def test_a_stopped_worker_is_replaced(tmp_path: Path) -> None:
    """SIGSTOP of the only decode worker in mid-answer: it is killed, and the answer goes on."""
    flags = (*EXACT, *Timeouts(worker_hang_s=4, worker_wait_s=60).stack_flags)
    with Stack(tmp_path, *flags) as stack:
        first = stop = stack.pid_of("decode-0")
        tokens: list[int] = []
        for event in stack.client.generate(SHORT["prompt"], timeout_s=120, max_tokens=64):
            tokens += getattr(event, "token_ids", ())
            if len(tokens) > 10 and stop:
                os.kill(stop, signal.SIGSTOP)
                stop = 0
        assert tokens == SHORT["tokens"]
        assert stack.pid_of("decode-0") != first
        assert metrics_of(stack.http_address)["diptych_worker_hangs_total"] == 1
        assert "local worker hangs; killing it" in stack.logs()["coordinator"]
        stack.assert_at_rest()


def test_sigterm_ends_everything_with_status_0(stacks: SharedStacks) -> None:
    with stacks.take(*SHARED) as stack:
        stack.generate(SHORT["prompt"], max_tokens=4)
        stack.process.send_signal(signal.SIGTERM)
        assert stack.process.wait(20) == 0
        assert not stack.pids()
        assert "Traceback" not in "".join(stack.logs().values())


def test_kill_9_of_the_coordinator_takes_its_workers(stack: Stack) -> None:
    assert len(stack.pids()) == 3
    stack.process.kill()
    stack.process.wait()
    until(lambda: not stack.pids(), 10, "no worker survives its coordinator")
