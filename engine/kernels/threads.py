"""The native thread pool of this process, and the page by which local workers share cores.

threads.c explains the lines of the page.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from engine.kernels import Kernels
from engine.process.core_share import CoreShare, owners, usable_cores
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
_LINE_BYTES = 64
_PAGE_BYTES = 4096
MAX_WORKERS = _PAGE_BYTES // _LINE_BYTES


class Threads:
    """The pool; one a process."""

    def __init__(self, library: Kernels, num_threads: int, share: CoreShare | None = None) -> None:
        """Start the helpers. Without a board this process uses all cores."""
        self._library = library.library
        board, core_owners = -1, [0] * num_threads
        if share is not None and 1 < share.count <= MAX_WORKERS:
            cores = max(num_threads, usable_cores())
            core_owners = owners(cores, share.index, share.count)[:num_threads]
            board = _open(Path(share.page))
        self.count: int = self._library.diptych_threads_start(
            num_threads,
            board,
            share.index if share else 0,
            (ctypes.c_int * num_threads)(*core_owners),
        )
        if board >= 0:
            os.close(board)

    def busy(self, busy: bool) -> None:
        """Around a step: other workers do not use this worker's cores while it is busy."""
        self._library.diptych_threads_busy(int(busy))


def _open(path: Path) -> int:
    """A descriptor of the page, with its memory allocated; -1 if that fails."""
    descriptor = -1
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(descriptor, 0, _PAGE_BYTES)  # a write on a full disk would be a SIGBUS
    except OSError as error:
        _log.warning("workers will not share cores", board=str(path), reason=error.strerror)
        if descriptor >= 0:
            os.close(descriptor)
        return -1
    return descriptor
