"""Which silent processes are killed, in made-up time; and real ones that are stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog.testing

from coordinator.cluster import watchdog as module
from coordinator.cluster.local_workers import LocalWorker, Supervisor
from coordinator.cluster.watchdog import Watchdog
from engine.base.types import Role
from tests.support.paths import ROOT

NAMES = ("prefill-0", "decode-0", "decode-1")


class Stand:
    """Places with processes that never end, their heartbeats, and a clock."""

    def __init__(self, hang_s: float = 30.0, start_s: float = 600.0) -> None:
        self.now = 1000.0
        self.beats: dict[str, float] = {}  # as of the process in the place
        self.hung: list[str] = []
        self.workers = [LocalWorker(name, Role.DECODE, Path(os.devnull)) for name in NAMES]
        self._pids = iter(range(2**31 - 100, 2**31))  # of no process
        for worker in self.workers:
            self.fill(worker)
        self.dog = Watchdog(
            self.workers,
            self._beat,
            hang_s=hang_s,
            start_s=start_s,
            on_hang=self.hung.append,
            clock=lambda: self.now,
        )

    def fill(self, worker: LocalWorker) -> None:
        process: Any = SimpleNamespace(pid=next(self._pids), killed=False, poll=lambda: None)
        process.kill = lambda: setattr(process, "killed", True)
        worker.process, worker.started_s = process, self.now
        self.beats.pop(worker.worker_id, None)

    def _beat(self, worker_id: str, since_s: float) -> float | None:
        beat = self.beats.get(worker_id)
        return beat if beat is not None and beat >= since_s else None

    def pass_time(self, seconds: float, *reporting: str) -> None:
        for _ in range(round(seconds)):
            self.now += 1.0
            self.beats.update(dict.fromkeys(reporting, self.now))
            self.dog.look()


def test_a_silent_one_is_killed_and_its_neighbours_are_not() -> None:
    stand = Stand()
    stand.pass_time(5, *NAMES)
    stand.pass_time(28, *NAMES[:2])
    assert not stand.hung
    with structlog.testing.capture_logs() as lines:
        stand.pass_time(4, *NAMES[:2])
    assert stand.hung == ["decode-1"]
    assert [w.process.killed for w in stand.workers] == [False, False, True]  # type: ignore[union-attr]
    (line,) = lines
    assert (line["worker"], line["flag"]) == ("decode-1", "--worker-hang-s")


def test_a_long_start_is_no_hang_until_its_own_bound() -> None:
    stand = Stand(start_s=600.0)
    stand.pass_time(590, *NAMES[:2])
    assert not stand.hung
    stand.pass_time(15, *NAMES[:2])
    assert stand.hung == ["decode-1"]


def test_0_waits_for_ever() -> None:
    stand = Stand(hang_s=0.0, start_s=0.0)
    stand.pass_time(5, *NAMES[:2])
    stand.pass_time(5000)
    assert not stand.hung


def test_a_pause_of_this_process_is_no_silence_of_workers() -> None:
    """This process was stopped, or the machine suspended: all have been silent for that long."""
    stand = Stand()
    stand.pass_time(5, *NAMES)
    for _ in range(3):
        stand.now += 500.0
        with structlog.testing.capture_logs() as lines:
            stand.dog.look()
        assert [line["event"] for line in lines] == [
            "this process was paused; silence is measured anew"
        ]
        stand.pass_time(20)  # they take their time to come back
        stand.pass_time(1, *NAMES)
    assert not stand.hung


def test_a_silent_one_is_found_after_a_pause_too() -> None:
    stand = Stand()
    stand.pass_time(5, *NAMES)
    stand.now += 500.0
    stand.pass_time(40, *NAMES[:2])
    assert stand.hung == ["decode-1"]


def test_one_at_a_time_and_the_next_only_when_its_successor_reports() -> None:
    """All silent at once: the fault may be on this side."""
    stand = Stand()
    stand.pass_time(5, *NAMES)
    stand.pass_time(50)
    assert stand.hung == ["prefill-0"]
    stand.fill(stand.workers[0])
    stand.pass_time(5)
    assert stand.hung == ["prefill-0"]
    stand.pass_time(3, "prefill-0")
    assert stand.hung == ["prefill-0", "decode-0"]
    stand.fill(stand.workers[1])
    stand.pass_time(70, "prefill-0")  # it does not come: the next place has its turn later
    assert stand.hung == ["prefill-0", "decode-0", "decode-1"]


def test_a_successor_begins_without_a_history() -> None:
    stand = Stand()
    stand.pass_time(5, *NAMES)
    stand.pass_time(40, *NAMES[:2])
    stand.fill(stand.workers[2])
    stand.pass_time(300, *NAMES[:2])
    assert stand.hung == ["decode-1"]


def test_a_debugger_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_traced", lambda pid: True)
    stand = Stand()
    stand.pass_time(5, *NAMES)
    with structlog.testing.capture_logs() as lines:
        stand.pass_time(60, *NAMES[:2])
    assert not stand.hung
    assert len(lines) == 1
    monkeypatch.setattr(module, "_is_traced", lambda pid: False)
    stand.pass_time(2, *NAMES[:2])
    assert stand.hung == ["decode-1"]


def test_which_process_is_traced() -> None:
    assert not module._is_traced(os.getpid())
    assert not module._is_traced(2**31 - 1)


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "sleeping_worker.py").write_text("import time\ntime.sleep(60)\n")
    root = str(ROOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), root]))
    yield tmp_path


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_a_stopped_process_is_replaced(sleeper: Path) -> None:
    """SIGTERM cannot end a stopped process; the place fills again, and the log reports it."""
    supervisor = Supervisor(
        [("w0", Role.DECODE)], sleeper / "logs", lambda name, role: ["sleeping_worker", name]
    )
    beats: dict[str, float] = {}
    dog = Watchdog(supervisor.workers, lambda name, since: beats.get(name), hang_s=2, start_s=60)
    supervisor.start()
    watching = asyncio.create_task(dog.run())
    try:
        worker = supervisor.workers[0]
        await until(lambda: worker.process is not None)
        first = worker.process
        assert first is not None
        beats["w0"] = time.monotonic()
        first.send_signal(signal.SIGSTOP)
        await until(lambda: worker.process is not first)
        assert first.poll() == -signal.SIGKILL
        assert worker.num_restarts == 1
    finally:
        watching.cancel()
        await supervisor.stop()


def test_a_process_under_ptrace_is_seen() -> None:
    """PTRACE_TRACEME: the child is stopped, and this process is its debugger."""
    script = "import ctypes, os\nctypes.CDLL(None).ptrace(0, 0, 0, 0)\nos.kill(os.getpid(), 19)\n"
    child = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 15
        while not module._is_traced(child.pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.kill()
        child.wait()
