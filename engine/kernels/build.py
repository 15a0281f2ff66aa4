"""Compiles the kernels once on a machine, with a compiler process for each source file.

    missing or damaged --lock--> objects, several at a time --> link --> an entry of the cache
                         '-- another process compiles: wait, then load its result

A slow compiler is not an error: the build waits while it runs and shows a line every few seconds.
The cache checks the file at each start (checkpoint/kept.py): a damaged one is made again.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO

from engine.base.errors import CheckpointError
from engine.base.kv_layout import digest_of
from engine.base.options import environment_with
from engine.checkpoint.kept import kept
from engine.telemetry.log import get_logger
from engine.telemetry.progress import LINE_S, Progress

_log = get_logger(__name__)
FOLDER = Path(__file__).parent
# No contraction: an expression must round the same way wherever it is compiled.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-pthread")
# matmul.c has its loops written out: -O3 gains nothing there and takes half as long again.
_OPTIMIZATION = {"matmul": "-O2"}
_LINK = ("-shared", "-lm")
# Ends a compiler that hangs, but not a slow one (a loaded machine took 300 s).
_COMPILE_S = 3600.0
_POLL_S = 0.05
_FILE = "kernels.so"


class BuildError(Exception):
    """The reason why there is no library, in one sentence."""


def built_library(compiler: str, flags: frozenset[str]) -> Path:
    """The whole shared object for these sources, compiler and CPU, made where there is none.

    Raises BuildError.
    """
    try:
        what = "compiling the CPU kernels"
        folder = kept(
            "native", _key(compiler, flags), partial(_build, compiler), wait_s=_COMPILE_S, what=what
        )
    except CheckpointError as error:
        raise BuildError(error.message) from None
    return folder / _FILE


def _key(compiler: str, flags: frozenset[str]) -> str:
    """A digest of everything that determines the result."""
    try:
        with Progress(f"waiting for {compiler} --version", first_s=LINE_S):
            version = subprocess.run(
                [compiler, "--version"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_COMPILE_S,
                check=True,
            ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} --version: {error}") from None
    texts = [path.read_bytes() for path in [*_sources(), *sorted(FOLDER.glob("*.h"))]]
    options = "\n".join(("2", *_FLAGS, *_LINK, *sorted(flags)))
    return digest_of(b"", *texts, version, options.encode()).hex()


def _sources() -> list[Path]:
    return sorted(FOLDER.glob("*.c"))


def _extra_flags(source: Path) -> list[str]:
    """The last level of optimisation counts."""
    level = _OPTIMIZATION.get(source.stem)
    return [level] if level else []


def _build(compiler: str, place: Path) -> None:
    began_s = time.monotonic()
    sources = _sources()
    # The longest first: the others fill the remaining cores.
    sources.sort(key=lambda source: (source.stem != "matmul", source.stem))
    with (
        tempfile.TemporaryDirectory(dir=place) as folder,
        Progress(f"compiling the CPU kernels ({len(sources)} files, once on a machine)") as shown,
    ):
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        commands = [
            [compiler, *_FLAGS, *_extra_flags(source), "-c", "-o", str(made), str(source)]
            for source, made in zip(sources, objects, strict=True)
        ]
        _run_all(commands, folder, shown)
        shown.detail = "linking"
        made = str(place / _FILE)
        _run_all([[compiler, *_FLAGS, "-o", made, *map(str, objects), *_LINK]], folder, shown)
    _log.info("kernels compiled", seconds=round(time.monotonic() - began_s, 1))


def _run_all(commands: Sequence[Sequence[str]], folder: str, shown: Progress) -> None:
    """Run compilers side by side, one a core. Raises BuildError with the message of one that
    fails; none is left running.
    """
    waiting = list(reversed(commands))
    running: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
    deadline = time.monotonic() + _COMPILE_S
    num_slots = max(2, len(os.sched_getaffinity(0)))
    try:
        while waiting or running:
            while waiting and len(running) < num_slots:
                output = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
                running.append((_start(waiting.pop(), folder, output), output))
            for process, log in [*running]:
                if process.poll() is not None:
                    running.remove((process, log))
                    _check(process, log)
                    if len(commands) > 1:
                        shown.detail = f"{len(commands) - len(waiting) - len(running)} done"
            if time.monotonic() > deadline:
                raise BuildError(f"the compiler did not end within {_COMPILE_S:.0f} s")
            time.sleep(_POLL_S)
    finally:
        for process, log in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the driver, and what it runs
            process.wait()
            log.close()


def _start(command: Sequence[str], folder: str, output: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment_with(TMPDIR=folder, LC_ALL="C"),  # see `_check`
            process_group=0,
        )
    except OSError as error:
        output.close()
        raise BuildError(f"{command[0]}: {error.strerror}") from None


def _check(process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
    """Raise BuildError if a compiler has failed, with the line that gives the reason; OSError if
    the disk is full.
    """
    with output:
        if process.returncode == 0:
            return
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    if process.returncode < 0:
        raise BuildError(f"the compiler was ended by signal {-process.returncode}")
    if any(os.strerror(errno.ENOSPC) in line for line in lines):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    reasons = [line.strip() for line in lines if "error" in line.lower()] or lines[-1:]
    raise BuildError(reasons[0][:500] if reasons else f"exit status {process.returncode}")
