"""Progress lines of long work without a terminal."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from engine.base.errors import CheckpointError
from engine.checkpoint.lock import exclusive
from engine.telemetry import progress
from engine.telemetry.progress import Progress, bar, print_line


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_S", 0.05)
    monkeypatch.setattr(progress, "_FIRST_LINE_S", 0.05)


def test_lines_are_printed_while_the_work_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("compiling") as shown:
        shown.detail = "2 of 6"
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "compiling"
    assert lines[1] == "compiling: 2 of 6, 0 s"
    assert len(lines) >= 3
    time.sleep(0.15)
    assert capsys.readouterr().err == "", "and end with it"


def test_a_bar_is_lines_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in bar(range(4), desc="Packing x"):
        time.sleep(0.1)
    said = capsys.readouterr().err
    assert "Packing x: 50 %, 0 s" in said
    with bar(desc="Hashing x", total=8, unit="B") as shown:
        shown.update(6)
        time.sleep(0.2)
    assert "Hashing x: 75 %, 0 s" in capsys.readouterr().err


def test_short_or_hidden_work_prints_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in bar(range(4), desc="Packing x", show=False):
        time.sleep(0.05)
    monkeypatch.setattr(progress, "_FIRST_LINE_S", 5.0)
    assert list(bar(range(4), desc="Packing x")) == [0, 1, 2, 3]
    assert capsys.readouterr().err == ""


def test_a_closed_stderr_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Gone())
    print_line("x")


def test_waiting_for_another_process_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checkpoint.lock._QUIET_S", 0.05)
    path = tmp_path / "lock"
    with (
        exclusive(path, 1.0),
        pytest.raises(CheckpointError, match="converting this model: another process"),
        exclusive(path, 0.3),
    ):
        pass
    assert "waiting for another process, which is converting this model" in capsys.readouterr().err
