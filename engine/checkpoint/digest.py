"""Digests of whole files: every byte is read once; a note keeps the digests of unchanged files.

    file | range 0 | range 1 ... |    a range: a tensor, or all of the file
         | 8 MiB | 8 MiB | ...   |    a piece: SHA-256, in threads
    digest of a range = SHA-256 over the digests of its pieces

    <cache>/digests/<digest of the path>.json    the file's state and its digests, sealed
                                        .lock    held while a process hashes the file

SHA-256 because processors have instructions for it: see "Digests of all bytes" in docs/decisions.md
for what was measured.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from engine.base.errors import CheckpointError
from engine.checkpoint.files import FileState, read_sealed, write_sealed
from engine.checkpoint.lock import exclusive
from engine.checkpoint.places import CacheError, in_a_place
from engine.telemetry.cache import count_damaged
from engine.telemetry.log import get_logger
from engine.telemetry.progress import byte_bar

_log = get_logger(__name__)
_VERSION = 1  # of a digest's definition: part of every note
_PIECE_BYTES = 8 << 20
_MAX_THREADS = 16
_WAIT_S = 1800.0
# A change within one tick of the clock (at most 10 ms) does not change ctime: wait one.
_TICK_NS = 20_000_000
Range = tuple[int, int]  # [begin, end) bytes of a file


@dataclass(frozen=True, slots=True)
class Digested:
    """A file's digests, and the state of the file when it was hashed."""

    state: FileState
    digests: tuple[str, ...]  # hex, one a range


def file_digests(path: Path, ranges: Sequence[Range] = ()) -> Digested:
    """Digests of `ranges`, by default of the whole file; an unchanged file is not read again.

    One process reads a file at a time, the others wait for its note. Raises CheckpointError, also
    if the file changes meanwhile.
    """
    state = FileState.of(path)
    ranges = ranges or [(0, state.size_bytes)]
    name = hashlib.sha256(os.fsencode(state.path)).hexdigest()[:32]

    hashed: list[Digested] = []

    def find(base: Path) -> Digested | None:
        found = read_sealed(base / "digests" / f"{name}.json") or {}
        if (found.get("version"), found.get("file")) != (_VERSION, state.fields()):
            return None
        digests = tuple(found["digests"])
        return Digested(state, digests) if len(digests) == len(ranges) else None

    def make(base: Path) -> Digested:
        folder = base / "digests"
        note = folder / f"{name}.json"
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / f"{name}.lock", _WAIT_S, what=f"hashing {path.name}"):
            if (found := find(base)) is not None:
                return found
            if note.exists() and read_sealed(note) is None:
                count_damaged("digests")
                _log.warning("a remembered digest is damaged: hashing again", path=str(note))
            if not hashed:
                hashed.append(_hash(state, ranges, path.name))
            content = {"version": _VERSION, "file": state.fields()}
            write_sealed(note, content | {"digests": hashed[0].digests})
        return hashed[0]

    try:
        return in_a_place(find, make)
    except CacheError as error:
        _log.warning("digests are not remembered", reason=error.message)
        return hashed[0] if hashed else _hash(state, ranges, path.name)


def _hash(state: FileState, ranges: Sequence[Range], name: str) -> Digested:
    if abs(time.time_ns() - state.ctime_ns) < _TICK_NS:
        time.sleep(_TICK_NS / 1e9)
    with byte_bar(f"Hashing {name}", sum(end - begin for begin, end in ranges)) as shown:
        digests = hash_ranges(state.path, ranges, shown.update)
    state.check()
    return Digested(state, tuple(digests))


def hash_ranges(
    path: Path, ranges: Sequence[Range], update: Callable[[int], object] = lambda n: None
) -> list[str]:
    """Hex digest of each range of a file; `update` gets the number of bytes done, piece by piece.

    Raises CheckpointError where the file is unreadable or ends within a range.
    """
    pieces = [
        (i, at, min(at + _PIECE_BYTES, end))
        for i, (begin, end) in enumerate(ranges)
        for at in range(begin, end, _PIECE_BYTES)
    ]
    whole = [hashlib.sha256() for _ in ranges]
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None

    def hashed(piece: tuple[int, int, int]) -> bytes:
        _, begin, end = piece
        data = os.pread(fd, end - begin, begin)
        if len(data) != end - begin:
            raise CheckpointError(f"{path}: truncated while it was read")
        return hashlib.sha256(data).digest()

    pool = ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0))))
    try:
        for (i, begin, end), digest in zip(pieces, pool.map(hashed, pieces), strict=True):
            whole[i].update(digest)
            update(end - begin)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    finally:
        pool.shutdown(cancel_futures=True)
        os.close(fd)
    return [h.hexdigest() for h in whole]


def joined_digest(digests: Sequence[str]) -> str:
    """Hex digest of several files in their order; of one file its own."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def whole_file(path: Path, update: Callable[[int], object] = lambda n: None) -> tuple[int, str]:
    """(size in bytes, digest) of a file now, never remembered. Raises CheckpointError."""
    size = FileState.of(path).size_bytes
    return size, hash_ranges(path, [(0, size)], update)[0]
