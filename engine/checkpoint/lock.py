"""One converter at a time: an advisory file lock with a deadline. The kernel lets go of it when its
owner dies.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import CheckpointError

_POLL_S = 0.05


@contextmanager
def exclusive(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock file `path`; CheckpointError if another process holds it for longer than
    `wait_s`.
    """
    deadline = time.monotonic() + wait_s
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{path}: another process has been converting this model for {wait_s:g} s"
                    ) from None
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)
