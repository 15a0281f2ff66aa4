"""Compile the kernels: once on a machine, a compiler process for each source file.

    missing or damaged --lock--> objects, several at a time --> link --> sum appended --> rename
                         '-- another process compiles: wait for it, then load what it made

Slow is not failed: while a compiler runs it is waited for, and a line every few seconds shows it.
The file ends with a checksum of the rest: one that a full disk or a crash damaged is made anew.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from engine.checkpoint.lock import exclusive
from engine.config import cache_dir, environment_with
from engine.errors import CheckpointError
from engine.telemetry.log import get_logger
from engine.telemetry.progress import LINE_S, Progress

_log = get_logger(__name__)
FOLDER = Path(__file__).parent
# No contraction: an expression must round the same wherever the compiler put it.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-pthread")
_LINK = ("-shared", "-lm")
# A compiler that hangs ends here; one that is slow (a loaded machine took 300 s) does not.
_COMPILE_S = 3600.0
_POLL_S = 0.05
_SUM_BYTES = 16


class BuildError(Exception):
    """Why there is no library, in one sentence."""


def built_library(compiler: str, flags: frozenset[str]) -> Path:
    """The whole shared object for these sources, compiler and CPU, made where there is none.

    Raises BuildError.
    """
    path = cache_dir() / "native" / f"kernels-{_key(compiler, flags)}.so"
    if not _is_whole(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(path.with_suffix(".lock"), _COMPILE_S, what="compiling the CPU kernels"):
                if not _is_whole(path):  # another process may have made it meanwhile
                    _build(compiler, path)
        except OSError as error:
            where = error.filename or path
            raise BuildError(
                f"{where}: {error.strerror}; DIPTYCH_CACHE_DIR names another place"
            ) from None
        except CheckpointError as error:
            raise BuildError(error.message) from None
    return path


def _key(compiler: str, flags: frozenset[str]) -> str:
    """A digest of all that decides what comes out."""
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
    key = hashlib.blake2b(digest_size=8)
    texts = [path.read_bytes() for path in [*_sources(), *sorted(FOLDER.glob("*.h"))]]
    for part in (*texts, version, repr((_FLAGS, _LINK, sorted(flags))).encode()):
        key.update(part)
    return key.hexdigest()


def _sources() -> list[Path]:
    return sorted(FOLDER.glob("*.c"))


def _build(compiler: str, path: Path) -> None:
    began_s = time.monotonic()
    for left in path.parent.glob(f"{path.stem}-*"):  # the lock is ours: its process was killed
        shutil.rmtree(left, ignore_errors=True)
    sources = _sources()
    # The longest first: the others fill the remaining cores.
    sources.sort(key=lambda source: (source.stem != "matmul", source.stem))
    with (
        tempfile.TemporaryDirectory(prefix=f"{path.stem}-", dir=path.parent) as folder,
        Progress(f"compiling the CPU kernels ({len(sources)} files, once on a machine)") as shown,
    ):
        objects = [Path(folder) / f"{source.stem}.o" for source in sources]
        commands = [
            [compiler, *_FLAGS, "-c", "-o", str(made), str(source)]
            for source, made in zip(sources, objects, strict=True)
        ]
        _run_all(commands, folder, shown)
        shown.detail = "linking"
        part = Path(folder) / path.name
        _run_all([[compiler, *_FLAGS, "-o", str(part), *map(str, objects), *_LINK]], folder, shown)
        content = part.read_bytes()
        with part.open("ab") as file:
            file.write(_sum(content))
        part.rename(path)
    _log.info("kernels compiled", seconds=round(time.monotonic() - began_s, 1), path=str(path))


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
            for process, said in [*running]:
                if process.poll() is not None:
                    running.remove((process, said))
                    _check(process, said)
                    if len(commands) > 1:
                        shown.detail = f"{len(commands) - len(waiting) - len(running)} done"
            if time.monotonic() > deadline:
                raise BuildError(f"the compiler did not end within {_COMPILE_S:.0f} s")
            time.sleep(_POLL_S)
    finally:
        for process, said in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the driver, and what it runs
            process.wait()
            said.close()


def _start(command: Sequence[str], folder: str, said: IO[bytes]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=environment_with(TMPDIR=folder),
            process_group=0,
        )
    except OSError as error:
        said.close()
        raise BuildError(f"{command[0]}: {error.strerror}") from None


def _check(process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    """Raise BuildError where a compiler has failed, with the line that tells why."""
    with said:
        if process.returncode == 0:
            return
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    if process.returncode < 0:
        raise BuildError(f"the compiler was ended by signal {-process.returncode}")
    telling = [line.strip() for line in lines if "error" in line.lower()] or lines[-1:]
    raise BuildError(telling[0][:500] if telling else f"exit status {process.returncode}")


def _is_whole(path: Path) -> bool:
    """Whether the file is there as it was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    if len(content) > _SUM_BYTES and _sum(content[:-_SUM_BYTES]) == content[-_SUM_BYTES:]:
        return True
    _log.warning("the compiled kernels are damaged and are made anew", path=str(path))
    return False


def _sum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_SUM_BYTES).digest()
