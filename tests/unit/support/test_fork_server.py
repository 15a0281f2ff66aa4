"""The fork server: what it starts is what `python -m` starts, and its end is reported."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fork_server import ForkedProcess, ForkServer
from tests.support.stack import until


@pytest.fixture
def server() -> Iterator[ForkServer]:
    it = ForkServer(["json"], {**os.environ, "FROM_TEST": "yes"})
    yield it
    it.close()


def ended(process: ForkedProcess) -> int:
    until(lambda: process.poll() is not None, 20, "the process ends")
    assert process.returncode is not None
    return process.returncode


def test_output_and_exit_status_are_those_of_the_module(server: ForkServer, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    assert ended(server.start("base64", ["-t"], log)) == 0
    assert log.read_text().startswith("before\n") and "Aladdin" in log.read_text()
    assert ended(server.start("base64", ["--no-such-option"], log)) == 2
    assert ended(server.start("no_such_module", [], log)) == 1
    assert "No module named no_such_module" in log.read_text()


def test_two_run_at_once_and_one_is_killed(server: ForkServer, tmp_path: Path) -> None:
    first, second = (server.start("http.server", ["0"], tmp_path / "log") for _ in range(2))
    assert first.pid != second.pid
    assert os.getpgid(first.pid) == first.pid
    assert b"FROM_TEST=yes" in Path(f"/proc/{first.pid}/environ").read_bytes()
    os.kill(first.pid, signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL
    assert second.poll() is None
    os.kill(second.pid, signal.SIGTERM)
    assert ended(second) == -signal.SIGTERM


def test_what_it_started_ends_with_it(tmp_path: Path) -> None:
    server = ForkServer(["json"], os.environ)
    process = server.start("http.server", ["0"], tmp_path / "log")
    server.close()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{process.pid}").exists():
        assert time.monotonic() < deadline, "it outlives its fork server"
        time.sleep(0.01)
