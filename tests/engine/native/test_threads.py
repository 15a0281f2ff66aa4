"""Loops give the same whoever helps, and neighbours on a machine keep out of each other's way."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine.errors import ConfigError
from engine.native import kernels
from engine.native.threads import Seat, owners

pytestmark = pytest.mark.skipif(
    kernels() is None, reason="needs a C compiler and a CPU with AVX512-BF16 and VNNI"
)

# Runs loops over a board of two and prints which threads took turns.
SCRIPT = """
import ctypes, sys
from engine.native import kernels
from engine.native.threads import Seat, Threads

library = kernels()
seat = Seat(sys.argv[1], 0, 2) if sys.argv[1] else None
threads = Threads(library, 3, seat)
assert threads.count == 3
turns = []
TURN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
@TURN
def run(arg, index, thread):
    ctypes.CDLL(None).usleep(1000)
    turns.append((index, thread))
for loop in range(20):
    threads.busy(True)
    turns.clear()
    library.library.parallel(40, run, None)
    threads.busy(False)
    assert sorted(index for index, _ in turns) == list(range(40)), turns
print(*sorted({thread for _, thread in turns}))
"""


def run(board: str) -> set[int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, board], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return {int(word) for word in done.stdout.split()}


def test_every_turn_is_taken_once() -> None:
    assert run("") == {0, 1, 2}


def test_a_busy_neighbours_cores_are_left_alone(tmp_path: Path) -> None:
    """Three threads, a share of one core for us and two for the neighbour."""
    board = tmp_path / "cores"
    page = np.zeros(512, np.int64)
    page[8] = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + 600 * 10**9
    board.write_bytes(page.tobytes())
    assert run(str(board)) == {0}


def test_an_idle_neighbours_cores_are_taken(tmp_path: Path) -> None:
    """So are those of one that died in mid-step: its line has run out."""
    board = tmp_path / "cores"
    page = np.zeros(512, np.int64)
    page[8] = time.clock_gettime_ns(time.CLOCK_MONOTONIC) - 1
    board.write_bytes(page.tobytes())
    assert run(str(board)) == {0, 1, 2}


def test_shares() -> None:
    assert owners(2, 0, 2) == [0, 1]
    assert owners(2, 1, 2) == [1, 0]
    assert owners(8, 1, 3) == [1, 1, 1, 0, 0, 2, 2, 2]
    assert owners(1, 2, 3) == [2], "more workers than cores: each has one thread"
    for count in (1, 2, 3, 5):
        for threads in (1, 2, 7, 16):
            for index in range(count):
                assert len(owners(threads, index, count)) == threads


def test_a_seat_is_file_index_and_count() -> None:
    assert Seat.parse("") is None
    assert Seat.parse("/a:b/cores:1:2") == Seat("/a:b/cores", 1, 2)
    for bad in ("cores", "cores:1", "cores:2:2", "cores:x:2", ":0:2"):
        with pytest.raises(ConfigError, match="FILE:INDEX:COUNT"):
            Seat.parse(bad)
