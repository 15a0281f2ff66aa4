"""What `make` does before anything else: what it finds missing, and what it makes of `.venv`."""

from __future__ import annotations

import ast
import doctest
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

import engine.kernels
from deploy.setup import __main__ as setup
from deploy.setup import machine, pip, venv
from deploy.setup.machine import Python, check_cpu, check_disk, check_platform, judge, pick_python
from deploy.setup.venv import Venv
from engine.base.cpu_features import KERNEL_FLAGS
from engine.checkpoint.packaged import DEFAULT_MODEL, PACKAGED
from tests.support.paths import ROOT

FOLDER = ROOT / "deploy" / "setup"
SAID = {
    "version": [3, 12, 1],
    "executable": "/usr/bin/python3.12",
    "kind": "CPython",
    "bits": 64,
    "no_gil": False,
    "missing": [],
}


def python(version: tuple[int, int], name: str = "python3", **changes: object) -> Python:
    return judge(name, {**SAID, "version": [*version, 0], **changes})


# -- which Python ----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_a_fitting_first_python_is_taken_without_a_word(version: tuple[int, int]) -> None:
    first, other = python(version), python((3, 12), "python3.12")
    assert pick_python([first, other], "") == (first, "", "")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": [3, 10, 2]}, "3.10, which is too old"),
        ({"version": [3, 8, 2]}, "3.8, which is too old"),
        ({"version": [3, 15, 0]}, "3.15, which is newer"),
        ({"no_gil": True}, "a free-threaded build"),
        ({"kind": "PyPy"}, "PyPy, 64 bits"),
        ({"bits": 32}, "CPython, 32 bits"),
        ({"missing": ["ensurepip"]}, "lacks the module ensurepip"),
    ],
)
def test_one_that_cannot_work_is_told_so_or_another_is_found(
    changes: dict[str, object], why: str
) -> None:
    bad = judge("python3", {**SAID, **changes})
    good = python((3, 13), "python3.13")
    found, problem, note = pick_python([bad, good], "")
    assert (found, problem) == (good, "")
    assert why in note
    assert "python3.13 is used instead" in note
    nothing, problem, note = pick_python([bad], "")
    assert nothing is None
    assert note == ""
    assert why.removeprefix("3.10, which ").removeprefix("3.8, which ")[:10] in problem
    assert "apt-get install python3" in problem


def test_a_python_without_ensurepip_names_its_package() -> None:
    _, problem, _ = pick_python([python((3, 12), missing=["ensurepip"])], "")
    assert problem == (
        "python3 lacks the module ensurepip; Debian, Ubuntu: apt-get install python3.12-venv"
    )


def test_the_newest_is_used_where_no_tested_one_is_there() -> None:
    newest, tested = python((3, 14)), python((3, 12), "python3.12")
    assert pick_python([newest, tested], "")[0] == tested
    found, problem, note = pick_python([newest], "")
    assert (found, problem) == (newest, "")
    assert "tested with 3.11 to 3.13" in note


def test_no_python_at_all() -> None:
    _, problem, _ = pick_python([], "/opt/python")
    assert problem.startswith("/opt/python: no such Python runs here")


def test_a_name_that_runs_nothing_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version manager's stand-in for a version that is not active."""
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\necho 'python3.12: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    (tmp_path / "python3.11").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [p.name for p in machine.candidates("")] == ["python3.11"]
    assert machine.ask("python3.12") is None


def test_it_and_pyproject_name_the_same_things() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={machine.OLDEST[0]}.{machine.OLDEST[1]}"
    assert setup.TORCH in project["optional-dependencies"]["worker"]
    assert setup.FLASHINFER in project["optional-dependencies"]["gpu"]
    assert sorted(machine.KERNEL_FLAGS) == sorted(KERNEL_FLAGS)
    assert machine.TIMES_SLOWER == engine.kernels.TIMES_SLOWER
    assert PACKAGED[DEFAULT_MODEL].requirement == setup.MODEL


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.name)
def test_old_pythons_can_read_it(path: Path) -> None:
    """It runs under whatever is first in the path, and has to say that this is too old."""
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    names = {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    for name in names | {str(m) for m in modules}:
        assert name.partition(".")[0] in {*sys.stdlib_module_names, "deploy"}, name
    assert not {"tomllib", "zoneinfo", "graphlib"} & names, "newer than 3.8"
    for node in ast.walk(tree):  # evaluated at run time, where 3.8 has no list[int] nor X | Y
        if isinstance(node, ast.AnnAssign | ast.FunctionDef):
            continue
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript):
            assert ast.unparse(node.value.value) not in ("list", "dict", "tuple", "set")


# -- the machine -----------------------------------------------------------------------------------


def test_platforms() -> None:
    assert check_platform("Linux", "x86_64", ("glibc", "2.36")) == []
    assert check_platform("Linux", "aarch64", ("glibc", "2.28")) == []
    assert "needs Linux" in check_platform("Darwin", "arm64", ("", ""))[0]
    assert "riscv64" in check_platform("Linux", "riscv64", ("glibc", "2.36"))[0]
    assert "not glibc" in check_platform("Linux", "x86_64", ("", ""))[0]
    assert "glibc is 2.17" in check_platform("Linux", "x86_64", ("glibc", "2.17"))[0]


def test_a_full_disk_is_named_with_what_is_needed(tmp_path: Path) -> None:
    assert check_disk([tmp_path], 0.0) == []
    (error,) = check_disk([tmp_path / "not there yet", tmp_path], 1e9)
    assert re.search(r"has [0-9.]+ GB of free disk space; about 1000000000.0 GB are needed", error)


def test_what_makes_answers_slower_is_a_note_with_the_remedy() -> None:
    def no_compiler() -> str:
        return "there is no C compiler (apt-get install build-essential)"

    assert check_cpu("x86_64", machine.KERNEL_FLAGS, lambda: "") == []
    (note,) = check_cpu("x86_64", machine.KERNEL_FLAGS, no_compiler)
    assert "times slower: there is no C compiler (apt-get install build-essential)" in note
    (note,) = check_cpu("x86_64", machine.KERNEL_FLAGS[1:], no_compiler)
    assert note.endswith("lacks the instructions avx512_vnni")
    assert check_cpu("aarch64", [], lambda: "")[0].endswith("the kernels are for x86_64")


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (None, "there is no C compiler"),
        ("echo 'probe.c:4:10: fatal error: stdio.h: No such file'; exit 1", "fatal error: stdio.h"),
        ("exit 0", ""),
    ],
)
def test_a_compiler_that_cannot_compile_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, problem: str
) -> None:
    if script is not None:
        path = tmp_path / "cc"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine.compiler_problem()
    assert problem in found
    assert bool(problem) == bool(found)
    assert not problem or "apt-get install build-essential" in found


def test_a_slow_compiler_is_no_missing_one_and_is_not_left_running(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded machines take minutes; the first start waits, so nothing is slower for it."""
    path = tmp_path / "cc"
    path.write_text(f"#!/bin/sh\n/bin/sleep 60 &\necho $! > {tmp_path}/pid\nwait\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "_ASK_S", 1.0)
    assert machine.compiler_problem() == ""
    assert ended(int((tmp_path / "pid").read_text()))


def test_a_full_disk_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tempfile finds no folder that it can write to, and there is no room for a compiler."""

    def full(*_arguments: object, **_how: object) -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(machine.tempfile, "gettempdir", full)
    monkeypatch.setattr(machine.tempfile, "TemporaryDirectory", full)
    found = machine.look(sys.executable, tmp_path, 1e9)
    assert any("GB of free disk space" in error for error in found.errors)


def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    assert check_disk([tmp_path], 0.0) == [f"{tmp_path} cannot be written to: change its rights"]


def test_a_user_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (error,) = machine.check_home("~", {"DIPTYCH_CACHE_DIR": "/x"})
    assert "set HOME, or DIPTYCH_CACHE_DIR and DIPTYCH_STATE_DIR" in error
    assert machine.check_home("~", {"DIPTYCH_CACHE_DIR": "/x", "XDG_STATE_HOME": "/y"}) == []
    assert machine.check_home("/root", {}) == []
    monkeypatch.setattr(machine.os.path, "expanduser", lambda path: path)
    assert tmp_path in machine.places(tmp_path)


# -- pip -------------------------------------------------------------------------------------------


def test_docstrings() -> None:
    for module in (pip, setup):
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        (["Collecting torch==2.13.0 (from diptych)"], "looking for torch"),
        (["  Downloading https://x/torch-2.13.0-cp312.whl (526 MB)"], "downloading torch"),
        (
            ["  Downloading torch-2.13.0-cp312.whl (526 MB)", "Progress 77332480 of 526000000"],
            "downloading torch: 77 of 526 MB",
        ),
        (["Installing collected packages: mpmath, torch, numpy"], "unpacking 3 packages"),
        (["  Building editable for diptych: started"], "building editable for diptych"),
    ],
)
def test_what_pip_is_at(lines: list[str], shown: str) -> None:
    state = pip.State()
    for line in lines:
        state.take(line)
    assert state.text == shown


def test_a_silent_step_shows_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pip.LINE_S <= 5.0
    monkeypatch.setattr(pip, "LINE_S", 0.0)
    script = "print('Collecting x', flush=True); import time; time.sleep(1.3)"
    assert pip.run([sys.executable, "-c", script], "Trying") == ["Collecting x"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "Trying"
    assert "  looking for x, 1 s" in said


def test_a_failed_step_gives_its_errors() -> None:
    script = "print('Collecting x'); print('ERROR: No matching distribution'); raise SystemExit(1)"
    with pytest.raises(pip.Failed, match=r"^ERROR: No matching distribution$"):
        pip.run([sys.executable, "-c", script], "Trying")


def test_without_a_network_the_network_is_named() -> None:
    said = """print('''WARNING: Retrying (Retry(total=0)) after connection broken by 'X': /simple/y/
ERROR: Could not find a version that satisfies the requirement y
ERROR: No matching distribution found for y'''); raise SystemExit(1)"""
    with pytest.raises(pip.Failed, match=r"for y\nThe package index was not reached: look at the"):
        pip.run([sys.executable, "-c", said], "Trying")


# -- the environment -------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path: Path) -> Venv:
    """One whose Python and pip are this process's."""
    folder = tmp_path / ".venv"
    (folder / "bin").mkdir(parents=True)
    starter = folder / "bin" / "python"
    starter.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    starter.chmod(0o755)
    (folder / "bin" / "pip").write_text(f"#!{folder}/bin/python\n")
    return Venv(folder)


def test_a_whole_environment_has_no_problem(environment: Venv) -> None:
    assert environment.problem() == ""


def test_half_made_environments_are_seen(environment: Venv, tmp_path: Path) -> None:
    assert Venv(tmp_path / "none").problem() == "does not exist"
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    assert Venv(link).problem() == "is a link to nothing"
    link.unlink()
    link.symlink_to(environment.folder)
    assert Venv(link).problem() == "", "a link to a whole one is one"
    moved = environment.folder.rename(tmp_path / "moved")
    assert Venv(moved).problem() == "was made in another folder"
    moved.rename(environment.folder)
    starter = environment.python.read_text()
    environment.python.write_text("#!/bin/sh\necho 'No module named pip' >&2; exit 1\n")
    assert environment.problem() == "has no pip, or a Python that does not run"
    environment.python.write_text("#!/bin/sh\necho 3.10\n")
    assert environment.problem() == "has Python 3.10"
    environment.python.write_text(starter)
    environment.python.unlink()
    environment.python.symlink_to("/usr/bin/python-that-was-removed")
    assert environment.problem() == "has no Python, or one that has gone"


def test_making_it_anew_leaves_what_a_link_points_to(
    environment: Venv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []
    monkeypatch.setattr(venv, "run", lambda command, title: made.append(command))
    link = tmp_path / "link"
    link.symlink_to(environment.folder)
    Venv(link).make("python3.12")
    assert not link.is_symlink()
    assert environment.python.exists()
    environment.make("python3.12")
    assert not environment.folder.exists()
    assert made[1] == ["python3.12", "-m", "venv", str(environment.folder)]


def test_an_interrupted_pip_is_known_and_its_halves_go(environment: Venv) -> None:
    packages = environment.folder / "lib" / "python3.12" / "site-packages"
    for name, files in {"whole-1": ["METADATA", "RECORD"], "half-2": ["METADATA"]}.items():
        entry = packages / f"{name}.dist-info"
        entry.mkdir(parents=True)
        for file in files:
            (entry / file).touch()
    (packages / "~orch").mkdir()
    environment.begin()
    assert environment.was_interrupted
    assert environment.sweep() == 1
    assert [p.name for p in packages.iterdir()] == ["whole-1.dist-info"]
    environment.done("run", "abc")
    assert not environment.was_interrupted
    assert environment.stamps() == {"run": "abc"}


class _Pip:
    """Notes what is installed; `metadata` is what the index has for torch."""

    def __init__(self, metadata: dict[str, object] | None = None) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.metadata = metadata

    def upgrade_itself(self) -> None:
        pass

    def install(self, title: str, *arguments: str) -> None:
        self.calls.append(arguments)

    def would_install(self, requirement: str, *arguments: str) -> dict[str, object] | None:
        return self.metadata


@pytest.fixture
def installing(environment: Venv, monkeypatch: pytest.MonkeyPatch) -> _Pip:
    fake = _Pip()
    monkeypatch.setattr(setup, "Pip", lambda python, cwd: fake)
    monkeypatch.setattr(setup, "run", lambda *args, **how: [])
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    monkeypatch.setattr(setup, "look", lambda *args, **how: machine.Findings())
    return fake


def test_a_step_is_done_once(environment: Venv, installing: _Pip) -> None:
    assert setup.Setup(environment, "", "").to("dev") == 0
    assert installing.calls == [
        (setup.TORCH,),
        ("-e", ".[worker]"),
        ("--no-deps", setup.MODEL),
        ("-e", ".[worker,dev]"),
        ("--no-deps", "--no-compile", setup.FLASHINFER),
    ]
    for step in ("dev", "run"):
        assert setup.Setup(environment, "", "").to(step) == 0
    assert len(installing.calls) == 5
    assert setup.Setup(environment, "", "").to("bench") == 0
    assert installing.calls[5:] == [("-e", ".[worker,bench]")]


def test_with_a_gpu_flashinfer_comes_whole(
    environment: Venv, installing: _Pip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert setup.Setup(environment, "", "").to("dev") == 0
    assert ("-e", ".[worker,gpu,dev]") in installing.calls
    assert not any(setup.FLASHINFER in call for call in installing.calls)


@pytest.mark.parametrize("times", [1, 2])
def test_packages_that_cannot_be_imported_are_installed_anew_once(
    environment: Venv, installing: _Pip, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """pip was killed while it unpacked torch, and takes it for installed."""
    failures = ["No module named 'torch._C'"] * times
    made: list[str] = []

    def run(command: list[str], title: str, **how: object) -> list[str]:
        if title == "Trying the installation" and failures:
            raise pip.Failed(failures.pop())
        return []

    monkeypatch.setattr(setup, "run", run)
    monkeypatch.setattr(Venv, "make", lambda self, python: made.append(python))
    found = machine.Findings(python=python((3, 12)))
    monkeypatch.setattr(setup, "look", lambda *args, **how: found)
    if times == 1:
        assert setup.Setup(environment, "", "").to("run") == 0
    else:
        with pytest.raises(pip.Failed, match=r"torch\._C"):
            setup.Setup(environment, "", "").to("run")
        assert "run" not in environment.stamps()
    assert made == ["/usr/bin/python3.12"]


def test_torch_with_cuda_is_announced_in_gigabytes_before_it_is_fetched(
    environment: Venv,
    installing: _Pip,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installing.metadata = {"requires_dist": ["sympy", "cuda-toolkit==13; sys_platform == 'linux'"]}
    monkeypatch.setattr(setup, "check_disk", lambda folders, need: [])
    assert setup.Setup(environment, "", "").to("run") == 0
    said = capsys.readouterr().out
    assert f"about {setup.CUDA_DOWNLOAD_GB} GB are downloaded" in " ".join(said.split())
    assert "TORCH_INDEX=URL" in said
    assert installing.calls[0] == (setup.TORCH,)


def test_without_room_for_it_nothing_is_fetched(
    environment: Venv,
    installing: _Pip,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installing.metadata = {"requires_dist": ["nvidia-nccl-cu13"]}
    monkeypatch.setattr(setup, "check_disk", lambda folders, need: [f"{need:g} GB are needed"])
    assert setup.Setup(environment, "", "").to("run") == 2
    assert installing.calls == []
    assert "setup: 9 GB are needed" in capsys.readouterr().err


def test_the_cpu_build_comes_from_the_index_that_was_named(
    environment: Venv, installing: _Pip, capsys: pytest.CaptureFixture[str]
) -> None:
    installing.metadata = {"requires_dist": ["sympy"]}
    assert setup.Setup(environment, "", "file:///wheels").to("run") == 0
    assert installing.calls[0] == ("--index-url", "file:///wheels", "--no-deps", setup.TORCH)
    assert "Note" not in capsys.readouterr().out


def test_nothing_is_installed_where_something_is_missing(
    environment: Venv,
    installing: _Pip,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = machine.Findings(errors=["no Python", "no disk"], notes=["slow"])
    monkeypatch.setattr(setup, "look", lambda *args, **how: found)
    assert setup.Setup(environment, "", "").to("run") == 2
    assert installing.calls == []
    said = capsys.readouterr()
    assert said.err == "setup: no Python\nsetup: no disk\n"
    assert said.out == "Note: slow\n"


def test_looking_at_the_machine_shows_lines(
    environment: Venv,
    installing: _Pip,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(*_arguments: object, **_how: object) -> machine.Findings:
        time.sleep(0.5)
        return machine.Findings(errors=["no disk"])

    monkeypatch.setattr(pip, "LINE_S", 0.1)
    monkeypatch.setattr(setup, "look", slow)
    assert setup.Setup(environment, "", "").to("run") == 2
    assert "  looking at this machine, 0 s\n" in capsys.readouterr().out


def test_make_under_a_python_that_is_too_old_says_so_in_one_sentence(tmp_path: Path) -> None:
    """The whole way from `make`: a path on which the only Python is an old one."""
    for tool in ("sh", "make"):
        (tmp_path / tool).symlink_to(
            f"/usr/bin/{tool}" if Path(f"/usr/bin/{tool}").exists() else f"/bin/{tool}"
        )
    old = tmp_path / "python3"
    # An old Python runs the setup; asked for its version, it prints 3.10.
    said = '{"version": [3, 10, 4], "executable": "x", "kind": "CPython", "bits": 64, '
    said += '"no_gil": false, "missing": []}'
    old.write_text(
        "#!/bin/sh\n"
        f"case \"$2\" in *ensurepip*) echo '{said}'; exit 0;; esac\n"
        f'exec {sys.executable} "$@"\n'
    )
    old.chmod(0o755)
    root = tmp_path / "clone"
    root.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(FOLDER, root / "deploy" / "setup")  # no link: it would lead to our own .venv
    done = subprocess.run(
        ["make", "demo"],
        cwd=root,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("setup: ")]
    assert len(lines) == 1, done.stderr
    assert "python3 is Python 3.10, which is too old; Diptych needs Python 3.11 to 3.13" in lines[0]


# A setup of {root} that does nothing but wait for a child.
WAITS = """
import sys
from pathlib import Path
from deploy.setup import __main__ as setup, pip
class S:
    def __init__(self, *a): pass
    def to(self, step):
        pip.run([sys.executable, "-c", {child!r}], "Trying")
setup.ROOT = Path({root!r})
setup.Setup = S
sys.exit(setup.main(["run"]))
"""
CHILD = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)"


def waiting(tmp_path: Path) -> tuple[subprocess.Popen[str], int]:
    """A setup, and the child that it waits for."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(root=str(tmp_path), child=CHILD)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    path = tmp_path / "pid"
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return process, int(path.read_text())


def ended(pid: int) -> bool:
    """Whether a process ends within a few seconds."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_pip_and_leaves_no_traceback(tmp_path: Path, number: int) -> None:
    """SIGHUP: the terminal was closed."""
    process, child = waiting(tmp_path)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said == "\nsetup: interrupted; the next run goes on from here\n"
    assert ended(child)


def test_a_pip_whose_setup_was_killed_keeps_others_out(tmp_path: Path) -> None:
    """Two at work in one environment leave packages half written."""
    process, child = waiting(tmp_path)
    process.kill()
    process.communicate(timeout=30)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.kill(child, signal.SIGKILL)
        assert ended(child)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
