"""How many cores this process may use, and its place among the workers that share them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from engine.base.errors import ConfigError

_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Seat:
    """A worker's place among those that share a machine's cores: line `index` of `count`."""

    board: str  # file of one page: see `memory_board`
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
    """Whose core each thread works on, a thread a core: this worker's share first.

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


def usable_cores(root: Path = _CGROUPS, own: Path = _CGROUP) -> int:
    """How many cores this process may keep busy: its affinity, and a container's quota."""
    return max(1, min([len(os.sched_getaffinity(0)), *_quotas(root, own)]))


def _quotas(root: Path, own: Path) -> list[int]:
    """Cores' worth of time, rounded up, that each of our control groups grants (v2, and v1)."""
    try:
        names = [
            line.split(":", 2)[2] for line in own.read_text().splitlines() if line[:3] == "0::"
        ]
    except OSError:
        names = []
    folder = root / (names[0] if names else "").lstrip("/")
    texts = [
        _words(place / "cpu.max")
        for place in (folder, *folder.parents)
        if place.is_relative_to(root)
    ]
    texts.append(_words(root / "cpu/cpu.cfs_quota_us") + _words(root / "cpu/cpu.cfs_period_us"))
    limits = [text for text in texts if len(text) == 2 and all(word.isdecimal() for word in text)]
    return [-(-int(quota) // int(period)) for quota, period in limits if int(period)]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def memory_board() -> str:
    """The board's file, in memory: it is gone with this process, which has to outlive its workers.

    Not among the logs: a page of a disk's file is stopped at while it is written back.
    """
    return f"/proc/{os.getpid()}/fd/{os.memfd_create('diptych-cores')}"
