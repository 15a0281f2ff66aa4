"""The kernels' file: made once by one process; a slow compiler is no error; damage is repaired."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from engine import kernels as native
from engine.kernels import build
from engine.kernels.build import BuildError, built_library
from engine.telemetry import progress
from tests.support.paths import ROOT

FLAGS = frozenset(("a", "b"))

# Stands in for a C compiler: notes each call and writes the output file.
COMPILER = """\
#!{python} -S
import os, sys, time
folder = os.path.dirname(os.path.abspath(__file__))
if "--version" in sys.argv:
    print("stand-in 1"); sys.exit()
with open(folder + "/calls", "a") as calls:
    calls.write(repr(sys.argv[1:]) + "\\n")
{body}
with open(sys.argv[sys.argv.index("-o") + 1], "w") as out:
    out.write("an object")
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(progress, "LINE_S", 0.1)


def compiler(folder: Path, body: str = "") -> str:
    path = folder / "cc"
    path.write_text(COMPILER.format(python=sys.executable, body=textwrap.dedent(body)))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_each_source_has_a_compiler_of_its_own_and_a_line_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    num_sources = len(list(build.FOLDER.glob("*.c")))
    path = built_library(compiler(tmp_path, "time.sleep(0.2)"), FLAGS)
    made = calls(tmp_path)
    assert len([c for c in made if "'-c'" in c]) == num_sources
    assert len([c for c in made if "'-shared'" in c]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"compiling the CPU kernels ({num_sources} files, once on a machine)"
    assert any("done, " in line for line in lines[1:]), "and the progress"
    assert built_library(compiler(tmp_path, "time.sleep(0.2)"), FLAGS) == path
    assert len(calls(tmp_path)) == len(made), "the second start finds it"
    assert [p.name for p in path.parent.iterdir() if "-" in p.stem.replace("kernels-", "")] == []


def test_compilers_run_side_by_side(tmp_path: Path) -> None:
    body = """\
    here = folder + "/running-%d" % os.getpid()
    open(here, "w").close()
    deadline = time.monotonic() + 10
    while "-c" in sys.argv and time.monotonic() < deadline:
        if len([n for n in os.listdir(folder) if n.startswith("running-")]) > 1:
            open(folder + "/met", "w").close()
        if os.path.exists(folder + "/met"):
            break
        time.sleep(0.01)
    os.unlink(here)
    """
    built_library(compiler(tmp_path, body), FLAGS)
    assert (tmp_path / "met").exists()


def test_slow_is_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old limit of 120 s was for the whole compilation; on a loaded machine it took 300."""
    assert build._COMPILE_S >= 3600
    built_library(compiler(tmp_path, "time.sleep(0.3)"), FLAGS)
    monkeypatch.setattr(build, "_COMPILE_S", 0.2)
    with pytest.raises(BuildError, match="did not end within"):
        built_library(compiler(tmp_path, "time.sleep(30)"), frozenset("another"))


def test_a_compiler_that_is_slow_to_tell_its_version_is_waited_for_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a loaded machine or a network file system torch would compute, without a word."""
    path = tmp_path / "slow"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && sleep 1\nexec {compiler(tmp_path)} "$@"\n')
    path.chmod(0o755)
    timeouts: list[float] = []
    run = subprocess.run

    def noted(command: list[str], **how: Any) -> Any:
        timeouts.append(how["timeout"])
        return run(command, **how)

    monkeypatch.setattr(build.subprocess, "run", noted)
    monkeypatch.setattr(build, "LINE_S", 0.1)
    assert built_library(str(path), FLAGS).exists()
    assert f"waiting for {path} --version: 0 s" in capsys.readouterr().err
    assert timeouts == [build._COMPILE_S], "as long as for a compilation"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_damaged_file_is_made_anew(tmp_path: Path, damage: str) -> None:
    command = compiler(tmp_path)
    path = built_library(command, FLAGS)
    whole, before = path.read_bytes(), len(calls(tmp_path))
    cut = {"cut": whole[:-3], "flip": b"A" + whole[1:], "empty": b""}[damage]
    path.write_bytes(cut)
    assert built_library(command, FLAGS).read_bytes() == whole
    assert len(calls(tmp_path)) == 2 * before


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print('x.c: note'); print('x.c:3: fatal error: stdio.h: no file'); sys.exit(1)", "stdio"),
        ("print('ld: cannot find -lm'); sys.exit(1)", "ld: cannot find -lm"),
        ("os.kill(os.getpid(), 9)", "ended by signal 9"),
    ],
)
def test_a_failure_is_one_sentence_of_the_compiler(tmp_path: Path, body: str, reason: str) -> None:
    with pytest.raises(BuildError, match=reason) as raised:
        built_library(compiler(tmp_path, body), FLAGS)
    assert "\n" not in str(raised.value)


def test_a_failure_leaves_no_compiler_running(tmp_path: Path) -> None:
    """The children of a compiler driver end with it."""
    body = """\
    if "matmul" in sys.argv[-1]:
        import subprocess
        child = subprocess.Popen(["sleep", "60"])
        with open(folder + "/child", "w") as note:
            note.write(str(child.pid))
        os.rename(folder + "/child", folder + "/pid")
        child.wait()
    while not os.path.exists(folder + "/pid"):
        time.sleep(0.01)
    sys.exit(1)
    """
    with pytest.raises(BuildError):
        built_library(compiler(tmp_path, body), FLAGS)
    stat_file = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    deadline = time.monotonic() + 10
    while stat_file.exists() and stat_file.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_one_process_compiles_and_the_others_wait_with_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checkpoint.lock._QUIET_S", 0.1)
    command = compiler(tmp_path, "time.sleep(0.5)")
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(built_library(command, FLAGS)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(found)) == 1
    assert len(found) == 3
    num_sources = len(list(build.FOLDER.glob("*.c")))
    assert len(calls(tmp_path)) == num_sources + 1
    assert (
        "waiting for another process, which is compiling the CPU kernels" in capfd.readouterr().err
    )


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    command = compiler(tmp_path)
    path = built_library(command, FLAGS)
    stale = path.parent / f"{path.stem}-abc"
    stale.mkdir()
    path.unlink()
    built_library(command, FLAGS)
    assert not stale.exists()


def test_a_cache_that_cannot_be_written_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(BuildError, match="DIPTYCH_CACHE_DIR names another place"):
        built_library(compiler(tmp_path), FLAGS)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    monkeypatch.setattr(native, "cpu_flags", lambda: native.KERNEL_FLAGS)


@pytest.mark.usefixtures("fresh")
def test_why_there_are_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "compiler", lambda: None)
    assert native.kernels() is None
    assert "no C compiler" in native.why_not()
    assert "apt-get install build-essential" in native.why_not()
    broken = compiler(tmp_path, "print('cc1: error: no such CPU'); sys.exit(1)")
    monkeypatch.setattr(native, "compiler", lambda: broken)
    assert native.why_not() == "the CPU kernels could not be compiled: cc1: error: no such CPU"
    monkeypatch.setattr(native, "cpu_flags", lambda: native.KERNEL_FLAGS - {"avx512_vnni"})
    assert native.why_not() == "this CPU lacks the instructions avx512_vnni"


def test_ctrl_c_ends_the_compilers(tmp_path: Path) -> None:
    command = compiler(tmp_path, "open(folder + '/up', 'w').close(); time.sleep(60)")
    script = (
        "import sys\nfrom engine.kernels.build import built_library\n"
        "try: built_library(sys.argv[1], frozenset('x'))\nexcept KeyboardInterrupt: sys.exit(130)"
    )
    root = str(ROOT)
    process = subprocess.Popen(
        [sys.executable, "-c", script, command], env={**os.environ, "PYTHONPATH": root}
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "up").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    running = [
        entry.name
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and str(tmp_path / "cc") in _command(entry)
    ]
    assert running == []
    assert not list((tmp_path / "cache" / "native").glob("kernels-*-*"))


def _command(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
