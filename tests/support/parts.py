"""Runs every test, in four parts: `python -m tests.support.parts [pytest argument ...]`.

    limits     |====|                            tests with limits of time, several at once
    compilers       |==|                         compilers of constraints, one at a time
    stacks             |==================|      tests of real processes, one at a time
    computing          |- - - - - - - - - - -|   all others, at the lowest priority

A test of a real stack waits for most of its time, and leaves half of two cores idle. The tests that
only compute run there, and get what the stack does not use. Their output goes to a file, and is
shown once the stacks have ended. Each part prints its slowest 30 and writes build/junit/PART.xml;
the status is that of the first part that failed.

Ctrl-C and SIGTERM end all parts; pytest stops its stacks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tests.support.paths import ROOT

# Files and folders of tests that only compute. In them, LIMITS are the files that measure or limit
# a time.
COMPUTING = (
    "tests/gpu",
    "tests/unit/coordinator/text",
    "tests/unit/decode/speculative",
    "tests/unit/engine/attention",
    "tests/unit/engine/cache",
    "tests/unit/engine/checkpoint",
    "tests/unit/engine/constraints",
    "tests/unit/engine/kernels",
    "tests/unit/engine/models",
    "tests/unit/engine/runner",
    "tests/unit/engine/sampling",
    "tests/unit/engine/scheduling",
    "tests/unit/engine/step",
)
LIMITS = (
    "tests/unit/coordinator/text/test_detokenizer.py",
    "tests/unit/coordinator/text/test_tokenizer.py",
    "tests/unit/engine/checkpoint/test_kept.py",
    "tests/unit/engine/checkpoint/test_source.py",
    "tests/unit/engine/kernels/test_build.py",
    "tests/unit/engine/kernels/test_threads.py",
    "tests/unit/engine/step/test_constrained.py",
    "tests/unit/engine/step/test_costly_constraints.py",
    "tests/unit/engine/step/test_engine_thread.py",
)
# Compilers of constraints have a low priority, and would be late beside others.
COMPILERS = (
    "tests/unit/coordinator/generation/test_constrained_text.py",
    "tests/unit/coordinator/generation/test_constraints.py",
    "tests/unit/engine/constraints/test_constraints.py",
    "tests/unit/engine/constraints/test_limits.py",
    "tests/unit/engine/constraints/test_numbers.py",
    "tests/unit/engine/constraints/test_schemas.py",
)
STACKS = (
    "tests/ecosystem/test_conformance.py",
    "tests/ecosystem/test_examples.py",
    "tests/system",
    "tests/faults",
)
DOWNLOADED = "tests/models"  # make test-models
# The longest files begin first: no process waits for another one's last file.
LONGEST = (
    "tests/unit/engine/step/test_speculation_law.py",
    "tests/unit/engine/checkpoint/test_packed.py",
    "tests/unit/engine/sampling/test_native.py",
    "tests/unit/engine/runner/test_greedy_oracle.py",
    "tests/unit/coordinator/client/test_client.py",
    "tests/unit/coordinator/client/test_client_seams.py",
    "tests/unit/coordinator/api/grpc/test_service.py",
)
_NO_TESTS = 5  # pytest's status where its arguments select none
_INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_END_S = 90.0  # in which pytest stops the stacks after a signal


@dataclass(frozen=True, slots=True)
class Part:
    """One run of pytest."""

    name: str
    files: tuple[str, ...]
    num_processes: int = 0  # 0: without pytest-xdist
    niceness: int = 0  # against all other processes, also those of other sessions

    def command(self, junit: Path, args: Sequence[str]) -> list[str]:
        """`junit` is a folder; `args` come last, so they win."""
        command = [sys.executable, "-m", "engine.process.parent_death"]
        command += ["--parent", str(os.getpid()), "--env", "OMP_WAIT_POLICY=PASSIVE"]
        if self.num_processes:
            command += ["--env", "OMP_NUM_THREADS=1"]
        if self.niceness:
            command += ["--nice", str(self.niceness)]
        command += ["pytest", "--durations=30", f"--junitxml={junit / self.name}.xml"]
        if self.num_processes:
            command += [f"-n{self.num_processes}", "--dist=loadfile", "--no-loadscope-reorder"]
        if self.niceness:
            command += ["-o", "timeout=900"]  # stacks may take both cores for a while
        return [*command, *self.files, *args]


@dataclass(frozen=True, slots=True)
class Parts:
    """What is run; each file of tests is in one part."""

    limits: Part
    compilers: Part
    stacks: Part
    computing: Part


def parts_of(jobs: int) -> Parts:
    """All tests of the repository but those of real models, which are downloaded."""
    found = (str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py"))
    paths = [path for path in found if not path.startswith(f"{DOWNLOADED}/")]
    paths.sort(key=lambda path: (LONGEST.index(path) if path in LONGEST else len(LONGEST), path))
    files: dict[str, list[str]] = {"limits": [], "compilers": [], "stacks": [], "computing": []}
    for path in paths:
        files[_part_of(path)].append(path)
    return Parts(
        Part("limits", tuple(files["limits"]), 2 * jobs),
        Part("compilers", tuple(files["compilers"])),
        Part("stacks", tuple(sorted(files["stacks"], key=_place))),
        Part("computing", tuple(files["computing"]), jobs, niceness=19),
    )


def _part_of(path: str) -> str:
    if path.startswith(STACKS):
        return "stacks"
    if path in COMPILERS:
        return "compilers"
    return "computing" if path.startswith(COMPUTING) and path not in LIMITS else "limits"


def _place(path: str) -> tuple[int, str]:
    return next(i for i, start in enumerate(STACKS) if path.startswith(start)), path


class _Interrupted(Exception):
    pass


@contextmanager
def _running(
    part: Part, junit: Path, args: Sequence[str], output: BinaryIO | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """One part in a session of its own, which a terminal's Ctrl-C does not reach."""
    command = part.command(junit, args)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True
    )
    try:
        if part.niceness:
            with suppress(OSError):  # without the file, niceness counts between sessions too
                Path(f"/proc/{process.pid}/autogroup").write_text(str(part.niceness))
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Have pytest end its tests where it still runs, and kill what is left of its group."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_END_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _show(log: Path, process: subprocess.Popen[bytes]) -> int:
    """Print the output of a part, from its start to its end; returns the status."""
    with log.open("rb") as output:
        while True:
            ended = process.poll() is not None
            while data := output.read(1 << 16):
                sys.stdout.buffer.write(data)
            sys.stdout.flush()
            if ended:
                return process.returncode
            time.sleep(0.2)


def run(parts: Parts, junit: Path, args: Sequence[str] = ()) -> int:
    """Run all parts; returns pytest's status of the first that failed.

    SIGINT, SIGTERM and SIGHUP end them.
    """

    def interrupt(signum: int, frame: object) -> None:
        for later in _SIGNALS:
            signal.signal(later, signal.SIG_IGN)
        raise _Interrupted

    for signum in _SIGNALS:
        signal.signal(signum, interrupt)
    try:
        return _run(parts, junit, args)
    except _Interrupted:
        return _INTERRUPTED


def _run(parts: Parts, junit: Path, args: Sequence[str]) -> int:
    junit.mkdir(parents=True, exist_ok=True)
    log = junit / "computing.log"
    statuses = []
    for part in (parts.limits, parts.compilers):
        with _running(part, junit, args) as process:
            statuses.append(process.wait())
    with log.open("wb") as output, _running(parts.computing, junit, args, output) as background:
        with _running(parts.stacks, junit, args) as process:
            statuses.append(process.wait())
        print("tests that only compute, run beside the stacks:", flush=True)
        statuses.append(_show(log, background))
    return status_of(statuses)


def status_of(statuses: Sequence[int]) -> int:
    """The first failure; a part in which the arguments select no test is none, unless all are."""
    if all(status == _NO_TESTS for status in statuses):
        return _NO_TESTS
    return next((status for status in statuses if status not in (0, _NO_TESTS)), 0)


def main() -> None:
    """Run all tests with the arguments of this process; JOBS is the number of cores to use."""
    compile_kernels = "from engine.kernels import kernels; kernels()"
    subprocess.run([sys.executable, "-c", compile_kernels], cwd=ROOT, check=True)
    jobs = int(os.environ.get("JOBS") or os.cpu_count() or 1)
    sys.exit(run(parts_of(jobs), ROOT / "build" / "junit", sys.argv[1:]))


if __name__ == "__main__":
    main()
