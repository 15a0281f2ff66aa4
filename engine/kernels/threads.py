"""The native thread pool of this process, and the page on which local workers share cores.

See threads.c for what a line of the board means.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from engine.kernels import Kernels
from engine.process.core_share import Seat, owners, usable_cores
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
_LINE_BYTES = 64
_PAGE_BYTES = 4096
MAX_WORKERS = _PAGE_BYTES // _LINE_BYTES


class Threads:
    """The pool; one a process."""

    def __init__(self, library: Kernels, num_threads: int, seat: Seat | None = None) -> None:
        """Start the helpers. Where the board cannot be had, all cores count as ours."""
        self._library = library.library
        board, whose = -1, [0] * num_threads
        if seat is not None and 1 < seat.count <= MAX_WORKERS:
            cores = max(num_threads, usable_cores())
            whose = owners(cores, seat.index, seat.count)[:num_threads]
            board = _open(Path(seat.board))
        self.count: int = self._library.diptych_threads_start(
            num_threads, board, seat.index if seat else 0, (ctypes.c_int * num_threads)(*whose)
        )
        if board >= 0:
            os.close(board)

    def busy(self, busy: bool) -> None:
        """Around a step: the neighbours leave this worker's cores alone while it is busy."""
        self._library.diptych_threads_busy(int(busy))


def _open(path: Path) -> int:
    """A descriptor of the page, whose memory is there; -1 where it cannot be had."""
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
