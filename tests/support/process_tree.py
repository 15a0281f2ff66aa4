"""Processes and all that they started: their memory and their processor time."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """A process, all that it started, and all that those started."""
    found, todo = [], [pid]
    while todo:
        found.append(now := todo.pop())
        for task in _listed(Path(f"/proc/{now}/task")):
            try:
                todo += map(int, (task / "children").read_text().split())
            except OSError:
                pass  # has ended
    return found


def _listed(folder: Path) -> Iterator[Path]:
    try:
        yield from list(folder.iterdir())
    except OSError:
        return


def resident_bytes(pid: int) -> int:
    """0 of a process that has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def proportional_bytes(pid: int) -> int:
    """Its memory, with its part of what it shares: helpers are forks of each other."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    found = re.search(r"^Pss:\s+(\d+) kB", rollup, re.M)
    return int(found[1]) * 1024 if found else 0


def foreign_cpu_s() -> float:
    """Processor time so far of what this process did not start, and of other virtual machines."""
    ticks = os.sysconf("SC_CLK_TCK")
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    ours = 0
    for pid in descendants(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ours += sum(map(int, fields[11:15]))  # and of children that have ended
    return (user + nice + system + irq + softirq + steal - ours) / ticks


def demand(root: int, seconds: float = 0.5) -> float:
    """Cores that all threads of a process and its descendants use, or wait for, at this moment.

    Waiting counts: on a busy machine a thread that computes without end gets a part of a core.
    """

    def so_far() -> int:
        total = 0
        for pid in descendants(root):
            for task in _listed(Path(f"/proc/{pid}/task")):
                try:
                    running_ns, waiting_ns, _ = (task / "schedstat").read_text().split()
                except OSError:
                    continue  # has ended
                total += int(running_ns) + int(waiting_ns)
        return total

    before = so_far()
    time.sleep(seconds)
    return max(0, so_far() - before) / (seconds * 1e9)
