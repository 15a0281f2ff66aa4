"""Counts the cores that this process may use, and divides them among local workers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from engine.base.errors import ConfigError
from engine.base.memory import text_of

_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP = Path("/proc/self/cgroup")
_V1_FILES = ("cpu.cfs_quota_us", "cpu.cfs_period_us")


@dataclass(frozen=True, slots=True)
class CoreShare:
    """Worker `index` of `count` that share a machine's cores by a page of shared memory."""

    page: str  # file of one page: see `shared_page`
    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> CoreShare | None:
        """Parse FILE:INDEX:COUNT; "" gives None. Raises ConfigError."""
        page, _, count = text.rpartition(":")
        page, _, index = page.rpartition(":")
        if not text:
            return None
        if not page or not index.isdecimal() or not count.isdecimal() or int(index) >= int(count):
            raise ConfigError(f"--cores {text}: expected FILE:INDEX:COUNT with INDEX below COUNT")
        return cls(page, int(index), int(count))


def owners(num_threads: int, index: int, count: int) -> list[int]:
    """The worker that owns the core of each thread; one thread a core, own cores first.

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
    """The number of cores that this process may use, by its affinity and cgroup quotas."""
    return max(1, min([len(os.sched_getaffinity(0)), *_quotas(root, own)]))


def _quotas(root: Path, own: Path) -> list[int]:
    """The quota of each cgroup of this process (v2 and v1), in cores, rounded up."""
    names = (line.split(":", 2)[2] for line in text_of(own).splitlines() if line[:3] == "0::")
    folder = root / next(names, "").lstrip("/")
    groups = (group for group in (folder, *folder.parents) if group.is_relative_to(root))
    texts = [text_of(group / "cpu.max") for group in groups]
    texts.append(" ".join(text_of(root / "cpu" / name) for name in _V1_FILES))
    limits = [words for words in map(str.split, texts) if len(words) == 2]
    limits = [words for words in limits if all(word.isdecimal() for word in words)]
    return [-(-int(quota) // int(period)) for quota, period in limits if int(period)]


def shared_page() -> str:
    """Path of a memfd for the page. It ends with this process, which outlives its workers.

    A page of a file on disk would block writers while it is written back.
    """
    return f"/proc/{os.getpid()}/fd/{os.memfd_create('diptych-cores')}"
