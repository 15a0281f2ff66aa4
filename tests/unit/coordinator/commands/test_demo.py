"""`make demo`: what it shows, when it gives up, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coordinator.commands.demo import StackOutput, Stillness, cpu_seconds
from tests.support.paths import ROOT

# The demo with a fake stack that is never ready; {stack} is its command.
DEMO = """
import subprocess, sys
from coordinator.commands import demo
demo._STOP_S = 3.0
demo._STILL_S = {still_s}
def start(command, log_path):
    log = log_path.open("wb")
    return subprocess.Popen(
        [sys.executable, "-u", "-c", {stack!r}], stdout=log, stderr=log, start_new_session=True
    )
demo._start = start
sys.exit(demo.main())
"""
WAITS = "import os, time; print('pid', os.getpid()); time.sleep(60)"
IGNORES = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + WAITS


def demo(tmp_path: Path, stack: str, still_s: float = 60.0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-c", DEMO.format(stack=stack, still_s=still_s)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DIPTYCH_STATE_DIR": str(tmp_path)},
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("stack", "number"), [(WAITS, 2), (WAITS, 15), (IGNORES, 2)])
def test_an_interrupt_ends_it_without_a_traceback_or_leftovers(
    tmp_path: Path, stack: str, number: int
) -> None:
    process = demo(tmp_path, stack)
    assert process.stdout is not None
    line = ""
    while "pid" not in line:
        line = process.stdout.readline()
    process.send_signal(number)
    if stack is IGNORES:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)  # a second Ctrl-C: end at once
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == "\ndemo: interrupted\n"
    assert not alive(int(line.split()[1]))


def test_two_at_once_have_separate_logs(tmp_path: Path) -> None:
    both = [demo(tmp_path, f"print('line of {i}')", still_s=9.0) for i in range(2)]
    for i, process in enumerate(both):
        shown, said = process.communicate(timeout=60)
        assert f"line of {i}" in shown
        assert f"line of {1 - i}" not in shown + said
    assert len({path.parent for path in tmp_path.glob("**/coordinator.log")}) == 2


def test_the_error_of_an_uncreatable_log_folder_is_one_sentence() -> None:
    process = demo(Path("/proc/none"), WAITS)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.startswith("demo: /proc/none")
    assert len(said.splitlines()) == 1


def test_a_stack_without_progress_is_given_up(tmp_path: Path) -> None:
    process = demo(tmp_path, WAITS, still_s=1.0)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the stack has stood still for 1 s" in said
    assert "Traceback" not in said


def test_the_last_line_of_a_stack_that_ends_is_shown(tmp_path: Path) -> None:
    said = "coordinator: local workers need torch, which is not installed"
    process = demo(tmp_path, f"print({said!r}); print('{{\"event\": 1}}'); raise SystemExit(2)")
    shown, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"demo: the stack ended: {said}; logs in" in error
    assert f"  {said}\n" in shown


def test_lines_that_are_no_log_lines_are_shown_once_and_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    path.write_text('{"event": "x"}\ncompiling\ncoord')
    now = [0.0]
    output = StackOutput(path, lambda: now[0])
    output.show()
    assert capsys.readouterr().out == "  compiling\n"
    with path.open("a") as file:
        file.write("inator: starting\n\n")
    output.show()
    output.show()
    assert capsys.readouterr().out == "  coordinator: starting\n"
    now[0] += 4.5
    output.show()
    output.show()
    assert capsys.readouterr().out == "  starting, 4 s\n", "where the stack itself prints nothing"
    assert output.last == "coordinator: starting"


def test_slow_is_not_stuck(tmp_path: Path) -> None:
    """A log line or CPU time of any process of the stack is progress."""
    now = [0.0]
    busy = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    for script, moves in ((busy, True), ("import time; time.sleep(60)", False)):
        process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        try:
            time.sleep(1.0)  # its start uses CPU time too
            stillness = Stillness(process.pid, tmp_path, lambda: now[0])
            now[0] += 100.0
            time.sleep(1.0)
            assert (stillness.seconds() < 1.0) == moves
            (tmp_path / "decode-0.log").write_text("a line\n" * (2 if moves else 1))
            now[0] += 100.0
            assert stillness.seconds() < 1.0
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert cpu_seconds(2**22) == 0.0
