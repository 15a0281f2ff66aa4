"""An advisory file lock with a deadline, so that one process converts at a time.

The kernel releases it when its owner dies. A line on standard error shows that a process waits.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.base.errors import CheckpointError
from engine.telemetry.progress import Progress

_POLL_S = 0.05
_QUIET_S = 2.0


@contextmanager
def exclusive(path: Path, wait_s: float, *, what: str = "converting this model") -> Iterator[None]:
    """Hold the lock file `path`. `what`: the work of the holder.

    Raises CheckpointError if another process holds it for longer than `wait_s`.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _taken(fd):
            with Progress(f"waiting for another process, which is {what}", first_s=_QUIET_S):
                _wait(fd, time.monotonic() + wait_s, f"{path}: {what}", wait_s)
        yield
    finally:
        os.close(fd)


def _wait(fd: int, deadline: float, what: str, wait_s: float) -> None:
    while not _taken(fd):
        if time.monotonic() > deadline:
            raise CheckpointError(f"{what}: another process has been at it for {wait_s:g} s")
        time.sleep(_POLL_S)


def _taken(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
