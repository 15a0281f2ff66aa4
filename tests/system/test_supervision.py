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
from tests.support.stack import QUICK, Stack, metrics_of, until
from tests.support.timeouts import Timeouts

LONG, SHORT = greedy(1500)["prompt"], greedy(128)["prompt"]
NUM_TOKENS = 160
NUM_LONG = 3  # prompts at once, which take a prefill worker some seconds
SEAM = """import signal, time
signal.signal(signal.SIGUSR2, lambda *_: time.sleep(3600))
"""
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack for this module alone, which harms it; its last test ends it."""
    flags = (*QUICK, *Timeouts(worker_wait_s=60).stack_flags)
    with Stack(tmp_path_factory.mktemp("supervised"), *flags) as own:
        yield own


@pytest.fixture(scope="module")
def expected(stack: Stack) -> list[int]:
    """The undisturbed answer to SHORT."""
    return ask(stack)


def ask(stack: Stack, pid: int = 0, number: signal.Signals = signal.SIGKILL) -> list[int]:
    """The answer to SHORT; after some tokens a process gets a signal."""
    tokens: list[int] = []
    asked = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
    for event in stack.client.generate(SHORT, timeout_s=120, **asked):
        tokens += getattr(event, "token_ids", ())
        if len(tokens) > 10 and pid:
            os.kill(pid, number)
            pid = 0
    return tokens


def test_kill_9_of_the_decode_worker_in_mid_answer(stack: Stack, expected: list[int]) -> None:
    """The only one: the answer waits for it to come back, and goes on with the same tokens."""
    pid = stack.pid_of("decode-0")
    assert ask(stack, pid) == expected
    assert stack.pid_of("decode-0") != pid
    stack.assert_at_rest()


def test_kill_9_of_the_prefill_worker_while_it_computes(stack: Stack) -> None:
    answers: list[list[int]] = []

    def long(salt: str) -> None:
        answers.append(stack.generate(LONG, max_tokens=16, cache_salt=salt)[0])

    threads = [threading.Thread(target=long, args=(f"new-{i}",)) for i in range(NUM_LONG)]
    for thread in threads:
        thread.start()
    until(lambda: bool(stack.workers("prefill")[0].num_running), 20, "the prompt is being computed")
    os.kill(stack.pid_of("prefill-0"), signal.SIGKILL)
    for thread in threads:
        thread.join(120)
    until(stack.ready, 60, "the prefill worker is back")
    long("undisturbed")
    assert answers == [answers[-1]] * (NUM_LONG + 1)
    stack.assert_at_rest()


def test_requests_between_death_and_return_wait_and_finish(
    stack: Stack, expected: list[int]
) -> None:
    os.kill(stack.pid_of("decode-0"), signal.SIGKILL)
    assert ask(stack) == expected
    until(stack.ready, 60, "the decode worker is back")
    stack.assert_at_rest()


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack whose workers may hang: at SIGUSR2 their event loop does. Its last test ends it."""
    folder = tmp_path_factory.mktemp("hanging")
    (folder / "sitecustomize.py").write_text(SEAM)
    flags = (*QUICK, *Timeouts(worker_hang_s=4, worker_wait_s=60).stack_flags)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", f"{folder}:{ROOT}")
        stack = Stack(folder, *flags).start()
    yield stack
    stack.stop()


def hang_in_mid_answer(stack: Stack, number: signal.Signals, expected: list[int]) -> None:
    """Send a signal to the only decode worker; another one finishes the answer."""
    before = metrics_of(stack.http_address)
    first = stack.pid_of("decode-0")
    assert ask(stack, first, number) == expected
    assert stack.pid_of("decode-0") != first
    hangs = "diptych_worker_hangs_total"
    assert metrics_of(stack.http_address)[hangs] - before.get(hangs, 0) == 1
    assert "local worker hangs; killing it" in stack.logs()["coordinator"]
    stack.assert_at_rest()


def test_a_worker_whose_event_loop_is_stuck_is_replaced(
    hanging: Stack, expected: list[int]
) -> None:
    """Though a thread of it reports the stall."""
    hang_in_mid_answer(hanging, signal.SIGUSR2, expected)
    assert metrics_of(hanging.http_address)["diptych_worker_stalls_total"] == 1
    log = hanging.logs()["coordinator"]
    assert log.index("a worker's event loop stalls") < log.index("local worker hangs")
    assert "has sent nothing" not in log, "its stream was kept until it was killed"


def test_a_stopped_worker_is_replaced(hanging: Stack, expected: list[int]) -> None:
    """SIGSTOP of the only decode worker in mid-answer: it is killed, and the answer goes on."""
    hang_in_mid_answer(hanging, signal.SIGSTOP, expected)


def test_sigterm_ends_everything_with_status_0(hanging: Stack) -> None:
    hanging.generate(SHORT, max_tokens=4)
    hanging.process.send_signal(signal.SIGTERM)
    assert hanging.process.wait(20) == 0
    assert not hanging.pids()
    assert "Traceback" not in "".join(hanging.logs().values())


def test_kill_9_of_the_coordinator_takes_its_workers(stack: Stack) -> None:
    assert len(stack.pids()) == 3
    stack.process.kill()
    stack.process.wait()
    until(lambda: not stack.pids(), 10, "no worker survives its coordinator")
