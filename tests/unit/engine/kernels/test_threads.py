"""A loop gives the same with any helpers, and workers of a machine do not disturb each other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine.base.errors import ConfigError
from engine.kernels import kernels
from engine.process.core_share import CoreShare, owners, shared_page, usable_cores

needs_kernels = pytest.mark.skipif(
    kernels() is None, reason="needs a C compiler and a CPU with AVX512 and VNNI"
)

# On two cores, with three threads: one a share of a board of two, two the other.
START = """
import ctypes, os, sys, threading, time
from engine.kernels import kernels
from engine.kernels.threads import Threads
from engine.process.core_share import CoreShare

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
library = kernels()
seat = CoreShare(sys.argv[1], int(sys.argv[2]), 2) if sys.argv[1] else None
threads = Threads(library, 3, seat)
assert threads.count == 3
turns = []
TURN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
@TURN
def run(arg, index, thread):
    ctypes.CDLL(None).usleep(1000)
    turns.append((index, thread))
"""

# Prints which threads took turns.
LOOPS = """
for loop in range(20):
    threads.busy(True)
    turns.clear()
    library.library.parallel(40, run, None)
    threads.busy(False)
    assert sorted(index for index, _ in turns) == list(range(40)), turns
print(*sorted({thread for _, thread in turns}))
"""


# Two callers at once, each with loops of all lengths; then a child without our helpers.
CALLERS = """
@TURN
def count(arg, index, thread):
    address = arg + 4 * index
    ctypes.c_int.from_address(address).value += 1
def calls(seed):
    for loop in range(2000):
        num_turns = (loop * 7 + seed) % 100 + 1
        taken = (ctypes.c_int * 101)()
        library.library.parallel(num_turns, count, ctypes.byref(taken))
        assert list(taken) == [1] * num_turns + [0] * (101 - num_turns), list(taken)
    done.append(seed)
done = []
callers = [threading.Thread(target=calls, args=(seed,)) for seed in range(3)]
for caller in callers: caller.start()
for caller in callers: caller.join()
assert sorted(done) == [0, 1, 2]
child = os.fork()
if child == 0:
    calls(5)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
time.sleep(0.05)
before = time.process_time()
time.sleep(1)
print(int(1e6 * (time.process_time() - before)))
"""

# How often a helper on another worker's core woke in 300 loops.
WAKES = """
def wakes():
    helper = sorted(map(int, os.listdir("/proc/self/task")))[-1]
    text = open(f"/proc/self/task/{helper}/status").read()
    return int(text.split("\\nvoluntary_ctxt_switches:")[1].split()[0])
@TURN
def nothing(arg, index, thread):
    used.add(thread)
    ctypes.CDLL(None).usleep(20)
used = set()
time.sleep(0.05)
before = wakes()
for loop in range(300):
    library.library.parallel(8, nothing, None)
    time.sleep(0.0005)
assert used == {0, 1}, used
print(wakes() - before)
"""


def run(script: str, board: str, index: int = 0) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", START + script, board, str(index)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.splitlines()[-1].split()]  # above it: the log


def board_of(folder: Path, line: int, ahead_ns: int) -> str:
    """A board on which the worker of one line is busy for so long."""
    page = np.zeros(512, np.int64)
    page[8 * line] = time.clock_gettime_ns(time.CLOCK_MONOTONIC) + ahead_ns
    (folder / "cores").write_bytes(page.tobytes())
    return str(folder / "cores")


@needs_kernels
def test_every_turn_is_taken_once() -> None:
    assert run(LOOPS, "") == [0, 1, 2]


@needs_kernels
def test_several_callers_a_fork_and_rest() -> None:
    """One caller has the helpers, the others work alone; at rest no thread spins."""
    (idle_us,) = run(CALLERS, "")
    assert idle_us < 20_000


@needs_kernels
def test_a_busy_neighbours_cores_are_left_alone(tmp_path: Path) -> None:
    """Three threads: this worker has one core, the other worker two."""
    assert run(LOOPS, board_of(tmp_path, 1, 600 * 10**9)) == [0]


@needs_kernels
def test_who_may_not_work_is_not_woken(tmp_path: Path) -> None:
    (wakes,) = run(WAKES, board_of(tmp_path, 0, 600 * 10**9), index=1)
    assert wakes < 10


@needs_kernels
def test_an_idle_neighbours_cores_are_taken(tmp_path: Path) -> None:
    """Cores of a worker that died within a step are free when its line has run out."""
    assert run(LOOPS, board_of(tmp_path, 1, -1)) == [0, 1, 2]


@needs_kernels
def test_without_a_board_all_cores_are_ours(tmp_path: Path) -> None:
    assert run(LOOPS, str(tmp_path / "nowhere" / "cores")) == [0, 1, 2]
    assert run(LOOPS, str(tmp_path)) == [0, 1, 2]


@needs_kernels
def test_the_board_in_memory_is_seen_by_others() -> None:
    board = shared_page()
    assert run(LOOPS, board) == [0, 1, 2]
    with open(board, "r+b") as file:
        lines = np.frombuffer(file.read(), np.int64)[::8]
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        assert now - 60 * 10**9 < lines[0] < now, "it was busy a moment ago"
        assert not lines[1:].any()
        page = np.zeros(512, np.int64)
        page[8] = now + 600 * 10**9
        file.seek(0)
        file.write(page.tobytes())
    assert run(LOOPS, board) == [0]


def test_a_containers_quota_counts(tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    own = tmp_path / "own"
    own.write_text("0::/pod/box\n")
    root = tmp_path / "cgroup"
    (root / "pod" / "box").mkdir(parents=True)
    assert usable_cores(root, own) == cores
    assert usable_cores(root, tmp_path / "none") == cores
    (root / "pod" / "box" / "cpu.max").write_text("max 100000\n")
    assert usable_cores(root, own) == cores
    (root / "pod" / "cpu.max").write_text("20000 100000\n")
    assert usable_cores(root, own) == 1
    (root / "pod" / "cpu.max").write_text("110000 100000\n")
    assert usable_cores(root, own) == min(2, cores)
    (root / "cpu").mkdir()
    (root / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (root / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert usable_cores(root, own) == min(2, cores)
    (root / "cpu" / "cpu.cfs_quota_us").write_text("50000\n")
    assert usable_cores(root, own) == 1


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
    assert CoreShare.parse("") is None
    assert CoreShare.parse("/a:b/cores:1:2") == CoreShare("/a:b/cores", 1, 2)
    for bad in ("cores", "cores:1", "cores:2:2", "cores:x:2", ":0:2"):
        with pytest.raises(ConfigError, match="FILE:INDEX:COUNT"):
            CoreShare.parse(bad)
