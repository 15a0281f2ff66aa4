"""The native thread pool of this process, and the page on which local workers share cores.

See threads.c for what a line of the board means.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from engine.native import Kernels

_LINE_BYTES = 64
_PAGE_BYTES = 4096
MAX_WORKERS = _PAGE_BYTES // _LINE_BYTES


@dataclass(frozen=True, slots=True)
class Seat:
    """A worker's place among those that share a machine's cores: line `index` of `count`."""

    board: str  # file of one page, on a memory file system
    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Seat | None:
        """From FILE:INDEX:COUNT; None from nothing. Raises ConfigError."""
        board, _, rest = text.rpartition(":")
        board, _, index = board.rpartition(":")
        if not text:
            return None
        if not board or not index.isdecimal() or not rest.isdecimal() or int(index) >= int(rest):
            raise ConfigError(f"--cores {text}: expected FILE:INDEX:COUNT with INDEX below COUNT")
        return cls(board, int(index), int(rest))


def owners(num_threads: int, index: int, count: int) -> list[int]:
    """Whose core each thread works on: this worker's share first, then the neighbours'.

    >>> owners(4, 1, 2)
    [1, 1, 0, 0]
    """
    shares = [num_threads * i // count for i in range(count + 1)]
    own = [index] * max(1, shares[index + 1] - shares[index])
    others = [
        other
        for other in range(count)
        if other != index
        for _ in range(shares[other + 1] - shares[other])
    ]
    return (own + others)[:num_threads]


class Threads:
    """The pool; one a process."""

    def __init__(self, library: Kernels, num_threads: int, seat: Seat | None = None) -> None:
        """Start the helpers. Raises OSError where the board cannot be mapped."""
        self._library = library.library
        self._page: mmap.mmap | None = None
        board = None
        whose: Sequence[int] = [0] * num_threads
        if seat is not None and 1 < seat.count <= MAX_WORKERS:
            self._page = _map(Path(seat.board))
            board = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
            whose = owners(num_threads, seat.index, seat.count)
        self.count: int = self._library.diptych_threads_start(
            num_threads,
            ctypes.c_void_p(board),
            seat.index if seat else 0,
            (ctypes.c_int * num_threads)(*whose),
        )

    def busy(self, busy: bool) -> None:
        """Around a step: the neighbours leave this worker's cores alone while it is busy."""
        self._library.diptych_threads_busy(int(busy))


def _map(path: Path) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(descriptor, _PAGE_BYTES)
        return mmap.mmap(descriptor, _PAGE_BYTES)
    finally:
        os.close(descriptor)
