"""Constraint compilation has limits: CPU time, memory, wait, and the life of its parent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from engine.base.errors import Unavailable
from engine.base.types import Constraint, ConstraintKind
from engine.checkpoint.source import resolve
from engine.constraints import Checker, Vocabulary
from engine.constraints import checker as checker_module
from engine.constraints.sandbox import JobEnd, Sandbox
from tests.support import constraint_jobs as jobs


def schema(value: object) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(value))


def endless(mark: str) -> Constraint:
    """Compiles for hours, and uses gigabytes in the first minute."""
    patterns = [{"pattern": f"[a-z]*{chr(97 + i)}"} for i in range(26)]
    return schema({"type": "string", "title": mark, "allOf": patterns})


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(resolve("smollm2").folder, 49152, (2, 0))


@pytest.fixture(scope="module")
def sandbox(vocabulary: Vocabulary) -> Iterator[Sandbox]:
    made = Sandbox(vocabulary)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine needs longer for a second of CPU time."""
    monkeypatch.setattr(checker_module, "COMPILE_S", 60.0)


@pytest.fixture
def outcomes() -> Counter[str]:
    return Counter()


@pytest.fixture
def checker(vocabulary: Vocabulary, outcomes: Counter[str]) -> Iterator[Checker]:
    made = Checker(vocabulary, lambda outcome: outcomes.update([outcome]), cpu_s=0.6)
    yield made
    made.close()


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; [] if the process does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def children(pid: int) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return [each for each in pids if stat_of(each)[1:2] == [str(pid)]]


def is_alive(pid: int) -> bool:
    return stat_of(pid)[:1] not in ([], ["Z"])


def until(condition: Callable[[], bool], what: str, within_s: float = 30) -> None:
    end_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end_s, what
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("job", "end"),
    [(jobs.burn, JobEnd.CPU_TIME), (jobs.hog, JobEnd.MEMORY), (jobs.crash, JobEnd.DEPTH)],
)
def test_a_job_at_a_limit_ends_alone(sandbox: Sandbox, job: object, end: JobEnd) -> None:
    for slow in (False, True):
        bad = sandbox.submit(job, 0.5, slow=slow)  # type: ignore[arg-type]
        assert sandbox.submit(jobs.pid, 1.0).future.result(60).end is JobEnd.DONE
        assert bad.future.result(60).end is end
        assert sandbox.submit(jobs.pid, 1.0, slow=slow).future.result(60).end is JobEnd.DONE


def test_an_error_of_the_library_is_a_reason(sandbox: Sandbox) -> None:
    outcome = sandbox.submit(jobs.fail, 1.0).future.result(60)
    assert outcome.grammar is not None
    assert outcome.grammar.reason == "cannot be compiled: RuntimeError"


def test_an_abandoned_job_ends(sandbox: Sandbox) -> None:
    sandbox.submit(jobs.pid, 1.0).future.result(60)
    assert sandbox._fork_server is not None
    fork_server = sandbox._fork_server.pid
    trial = sandbox.submit(jobs.burn, 600.0, slow=True)

    def burning() -> list[int]:  # only the CPU time of this process grows
        return [each for each in children(fork_server) if sum(map(int, stat_of(each)[11:13])) >= 20]

    until(lambda: bool(burning()), "it runs")
    (runner,) = burning()
    trial.abandon()
    assert trial.future.result(10).end is JobEnd.LOST
    assert not is_alive(runner)
    assert sandbox.submit(jobs.pid, 1.0, slow=True).future.result(60).end is JobEnd.DONE


def test_a_lost_fork_server_is_started_again(sandbox: Sandbox) -> None:
    sandbox.submit(jobs.pid, 1.0).future.result(60)
    trial = sandbox.submit(jobs.burn, 600.0)
    until(trial.future.running, "it begins")
    assert sandbox._fork_server is not None
    gone = [sandbox._fork_server.pid, *children(sandbox._fork_server.pid)]
    os.kill(gone[0], signal.SIGKILL)
    assert trial.future.result(60).end is JobEnd.LOST
    assert sandbox.submit(jobs.pid, 1.0).future.result(60).end is JobEnd.DONE
    until(lambda: not any(map(is_alive, gone)), "its runners end with it")


def test_a_stopped_fork_server_is_replaced(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.constraints.sandbox._SILENT_S", 0.3)
    sandbox.submit(jobs.pid, 1.0).future.result(60)
    assert sandbox._fork_server is not None
    os.kill(sandbox._fork_server.pid, signal.SIGSTOP)
    trial = sandbox.submit(jobs.pid, 1.0)
    until(trial.future.running, "it is sent")
    trial.abandon()
    assert trial.future.result(30).end is JobEnd.LOST
    assert sandbox.submit(jobs.pid, 1.0).future.result(60).end is JobEnd.DONE


@pytest.mark.parametrize("num_bytes", [10, 4 << 20])
def test_a_fork_server_that_stops_reading_is_lost(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    """A large job does not fit the socket buffer, so sending it would block forever."""
    monkeypatch.setattr("engine.constraints.sandbox._SILENT_S", 1.0)
    monkeypatch.setattr("engine.constraints.sandbox._READS_S", 4.0)
    job = partial(jobs.sized, text="a" * num_bytes)
    sandbox._end()  # the next fork server has the shorter limit
    assert sandbox.submit(jobs.pid, 1.0).future.result(60).end is JobEnd.DONE
    assert sandbox.submit(job, 1.0).future.result(60).end is JobEnd.DONE
    assert sandbox._fork_server is not None
    os.kill(sandbox._fork_server.pid, signal.SIGSTOP)
    trial = sandbox.submit(job, 1.0)
    until(trial.future.running, "it is sent")
    trial.abandoned = True
    assert trial.future.result(60).end is JobEnd.LOST
    assert sandbox.submit(jobs.pid, 1.0).future.result(60).end is JobEnd.DONE


def test_shorter_jobs_come_first(sandbox: Sandbox) -> None:
    pause = [sandbox.submit(jobs.burn, 0.5) for _ in range(2)]
    until(lambda: all(trial.future.running() for trial in pause), "both slots are busy")
    later = [sandbox.submit(jobs.burn, 0.3) for _ in range(8)]
    assert sandbox.submit(jobs.pid, 0.29).future.result(60).end is JobEnd.DONE
    assert not later[-1].future.done()
    for trial in later:
        trial.abandon()


async def test_the_job_of_a_lost_runner_is_retried(
    checker: Checker, outcomes: Counter[str]
) -> None:
    await checker.check(schema({"const": "first"}))
    fork_server = checker._sandbox._fork_server
    assert fork_server is not None
    os.kill(fork_server.pid, signal.SIGKILL)
    assert not (await checker.check(schema({"const": "second"}))).reason
    assert outcomes["compiled"] == 2
    assert outcomes["lost"] == 1


_SMALL = """
import resource, sys, time
from pathlib import Path
from engine.constraints.grammar import Vocabulary
from engine.constraints.sandbox import JobEnd, Sandbox
from tests.support import constraint_jobs as jobs

sandbox = Sandbox(Vocabulary(Path(sys.argv[1]), 49152, (2, 0)))
assert sandbox.submit(jobs.pid, 1.0).future.result(60).end is JobEnd.DONE
fork_server = sandbox._fork_server.pid
pages = int(Path(f"/proc/{fork_server}/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (32 << 20)  # without room for the stack of a runner
resource.prlimit(fork_server, resource.RLIMIT_AS, (limit, limit))
print(fork_server, flush=True)
sandbox.submit(jobs.burn, 0.1).future.result(60)  # its runner ends; the next ones have the limit
time.sleep(600)
"""


def test_runners_that_cannot_start_use_no_cpu(vocabulary: Vocabulary) -> None:
    command = [sys.executable, "-c", _SMALL, str(vocabulary.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            fork_server = int(parent.stdout.readline())
            time.sleep(1.5)
            begun = sum(map(int, stat_of(fork_server)[11:15]))
            time.sleep(1.5)  # some 7 forks; without pauses they use all CPU time
            assert sum(map(int, stat_of(fork_server)[11:15])) - begun < 75
            assert is_alive(fork_server)
        finally:
            parent.kill()


_PARENT = """
import sys, time
from pathlib import Path
from engine.constraints.grammar import Vocabulary
from engine.constraints.sandbox import Sandbox
from tests.support import constraint_jobs as jobs

sandbox = Sandbox(Vocabulary(Path(sys.argv[1]), 49152, (2, 0)))
sandbox.submit(jobs.pid, 1.0).future.result(60)
sandbox.submit(jobs.burn, 600.0, slow=True)
print(sandbox._fork_server.pid, flush=True)
time.sleep(600)
"""


def test_all_processes_end_with_their_parent(vocabulary: Vocabulary) -> None:
    command = [sys.executable, "-c", _PARENT, str(vocabulary.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            fork_server = int(parent.stdout.readline())
            until(lambda: len(children(fork_server)) == 3, "one runner a slot")
            ended = [fork_server, *children(fork_server)]
        finally:
            parent.kill()
        until(lambda: not any(map(is_alive, ended)), "all end")


async def test_endless_compilations_are_refused_and_others_continue(
    checker: Checker, outcomes: Counter[str]
) -> None:
    bad = [asyncio.create_task(checker.check(endless(str(i)))) for i in range(3)]
    for i in range(5):
        assert not (await checker.check(schema({"const": i}))).reason
    found = await asyncio.gather(*bad, return_exceptions=True)
    assert any(not isinstance(each, BaseException) and "CPU time" in each.reason for each in found)
    assert outcomes["compiled"] == 5
    assert outcomes["cpu_time"] >= 1


async def test_a_constraint_at_a_limit_is_not_compiled_again(
    checker: Checker, outcomes: Counter[str]
) -> None:
    for _ in range(3):
        assert "CPU time" in (await checker.check(endless("again"))).reason
    assert outcomes["cpu_time"] == 1


async def test_a_job_without_waiters_is_killed(
    vocabulary: Vocabulary, outcomes: Counter[str]
) -> None:
    checker = Checker(vocabulary, lambda outcome: outcomes.update([outcome]), cpu_s=600.0)
    try:
        waits = [asyncio.create_task(checker.check(endless("left"))) for _ in range(2)]
        await asyncio.sleep(1.0)
        waits[0].cancel()
        await asyncio.sleep(0.2)
        assert not outcomes["abandoned"]
        waits[1].cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        for _ in range(100):
            if outcomes["abandoned"]:
                break
            await asyncio.sleep(0.05)
        assert outcomes["abandoned"] == 1
        assert not (await checker.check(schema({"const": "then"}))).reason
    finally:
        checker.close()


async def test_a_wait_is_bounded(
    vocabulary: Vocabulary, outcomes: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checker = Checker(vocabulary, lambda outcome: outcomes.update([outcome]), cpu_s=600.0)
    try:
        await checker.check(schema({"const": 0}))
        monkeypatch.setattr(checker_module, "COMPILE_S", 0.5)
        with pytest.raises(Unavailable, match="busy"):
            await checker.check(endless("waited for"))
        assert outcomes["busy"] == outcomes["abandoned"] == 1
    finally:
        checker.close()


async def test_tokens_that_cost_too_much_are_refused(
    checker: Checker, outcomes: Counter[str]
) -> None:
    ambiguous = Constraint(ConstraintKind.LARK, 'start: s\ns: s s | "a" | s s s')
    assert not (await checker.check(ambiguous)).reason
    assert "CPU time" in (await checker.check(ambiguous, [[81] * 4000])).reason
    assert (await checker.check(ambiguous, [[81], [82]])).mismatch_index == 1
