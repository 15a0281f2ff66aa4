"""`make test` runs each test once, beside each other where no time is measured."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support import parts
from tests.support.paths import ROOT

PASSES = "def test_it(): print('in {name}')\n"
FAILS = "def test_it(): assert '{name}' == ''\n"
NAMES = ("limits", "compilers", "stacks", "computing")
SLEEPS = """
import os, pathlib, time
def test_it():
    pathlib.Path(__file__).with_suffix(".pid").write_text(str(os.getpid()))
    time.sleep(60)
"""
RUN = """
import pathlib, sys
from tests.support.parts import Part, Parts, run
folder = pathlib.Path(sys.argv[1])
names = [(name, (str(folder / f"test_{name}.py"),)) for name in sys.argv[2].split()]
*others, computing = names
all_parts = Parts(*(Part(*each) for each in others), Part(*computing, 1, niceness=1))
sys.exit(run(all_parts, folder / "junit", sys.argv[3:]))
"""


def begin(folder: Path, *args: str, **tests: str) -> subprocess.Popen[str]:
    """All parts with one test each: `tests` by the name of a part."""
    for name, code in tests.items():
        (folder / f"test_{name}.py").write_text(code.replace("{name}", name))
    command = [sys.executable, "-c", RUN, str(folder), " ".join(NAMES), *args]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_each_file_is_in_one_part() -> None:
    all_parts = parts.parts_of(2)
    counts = Counter(path for name in NAMES for path in getattr(all_parts, name).files)
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")}
    assert set(counts) == {path for path in found if not path.startswith("tests/models/")}
    assert set(counts.values()) == {1}
    assert all_parts.stacks.files[0].startswith(parts.STACKS[0])
    assert "tests/faults" in all_parts.stacks.files[-1]


@pytest.mark.parametrize(
    "paths", [parts.COMPUTING, parts.LIMITS, parts.COMPILERS, parts.STACKS, parts.LONGEST], ids=str
)
def test_lists_name_what_exists(paths: tuple[str, ...]) -> None:
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_background_is_shown_whole_after_the_stacks(tmp_path: Path) -> None:
    tests = dict.fromkeys(NAMES, PASSES)
    with begin(tmp_path, "-rP", "-q", **tests) as process:
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    places = [output.index(f"in {name}") for name in tests]
    assert places == sorted(places)
    assert output.count("1 passed") == output.count("slowest 30 durations") == 4
    written = {path.stem for path in (tmp_path / "junit").glob("*.xml")}
    assert written == set(NAMES)


def test_a_failure_fails_all(tmp_path: Path) -> None:
    tests = {"limits": FAILS, "compilers": PASSES, "stacks": PASSES, "computing": FAILS}
    with begin(tmp_path, "-q", **tests) as process:
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 1
    assert (output.count("1 passed"), output.count("1 failed")) == (2, 2)


@pytest.mark.parametrize(
    ("statuses", "status"),
    [((0, 0, 0), 0), ((1, 0, 0), 1), ((0, 0, 2), 2), ((5, 0, 5), 0), ((5, 5, 5), 5)],
)
def test_no_selected_test_in_a_part_is_no_failure(statuses: tuple[int, ...], status: int) -> None:
    assert parts.status_of(statuses) == status


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_parts(tmp_path: Path, signum: signal.Signals) -> None:
    tests = {"limits": PASSES, "compilers": PASSES, "stacks": SLEEPS, "computing": SLEEPS}
    with begin(tmp_path, **tests) as process:
        files = [tmp_path / "test_stacks.pid", tmp_path / "test_computing.pid"]
        deadline_s = time.monotonic() + 60
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        pids = [int(file.read_text()) for file in files]
        stacks, computing = (os.getpriority(os.PRIO_PROCESS, pid) for pid in pids)
        assert computing == min(19, stacks + 1)
        process.send_signal(signum)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
