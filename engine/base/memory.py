"""Measures the host memory that a process may still use, and names its limit. No torch here.

    available = min(MemAvailable, limit - usage + reclaimable page cache   of each cgroup)

The page cache counts as available, active file pages too: a model that is read at each start is
active.

A coordinator measures once, and gives each local worker an equal share (`share`). Workers that
measure at the same time would both count memory that the other has not touched yet, and a worker
that restarts would see less than it had before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.base.errors import ConfigError

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_V2_LIMITS: tuple[str, ...] = ("memory.max", "memory.high")
_V1_LIMITS: tuple[str, ...] = ("memory.limit_in_bytes",)
_UNITS = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))


def readable_size(num_bytes: int) -> str:
    """A size in a readable unit.

    >>> readable_size(192 << 20), readable_size(3 << 29)
    ('192 MiB', '1.5 GiB')
    """
    for unit, name in _UNITS:
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f}".removesuffix(".0") + f" {name}"
    return f"{num_bytes} bytes"


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes that may be used, and a description of the limit, such as "the cgroup's 2 GiB"."""

    available_bytes: int
    limit: str

    def share(self, count: int) -> HostMemory:
        """One of `count` equal parts."""
        return HostMemory(self.available_bytes // max(1, count), self.limit)

    def __str__(self) -> str:
        """BYTES:LIMIT, as `parse` reads it."""
        return f"{self.available_bytes}:{self.limit}"

    @classmethod
    def parse(cls, text: str) -> HostMemory | None:
        """Parse BYTES:LIMIT; "" gives None. Raises ConfigError."""
        number, _, limit = text.partition(":")
        if not text:
            return None
        if not number.isdecimal() or not limit:
            raise ConfigError(f"--memory-share {text}: expected BYTES:LIMIT")
        return cls(int(number), limit)


def host_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> HostMemory:
    """The memory that this process may still use."""
    available = _available(proc / "meminfo")
    found = HostMemory(available, f"the machine's {readable_size(available)} of available memory")
    for limit, left in _cgroup_limits(proc / "self/cgroup", cgroups):
        if left < found.available_bytes:
            found = HostMemory(left, f"the cgroup's {readable_size(limit)}")
    return found


def _available(meminfo: Path) -> int:
    """MemAvailable, which includes reclaimable pages; kernels before 3.14 do not have it."""
    lines = (line.split() for line in text_of(meminfo).splitlines())
    kib = {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
    fallback = kib.get("MemFree:", 0) + kib.get("Cached:", 0)
    return kib.get("MemAvailable:", fallback) * 1024


def _cgroup_limits(own: Path, root: Path) -> list[tuple[int, int]]:
    """(limit, bytes left) of this process's cgroups and all their parents, v2 and v1.

    A container may see the path that its cgroup has on the host while that cgroup is mounted as the
    root, so paths that do not exist are skipped.
    """
    found = []
    for line in text_of(own).splitlines():
        _, controllers, name = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            base, limits, usage = root, _V2_LIMITS, "memory.current"
            reclaimable = ("inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            base, limits, usage = root / "memory", _V1_LIMITS, "memory.usage_in_bytes"
            reclaimable = ("total_inactive_file", "total_active_file")
        else:
            continue
        folder = base / name.lstrip("/")
        for group in (folder, *folder.parents):
            numbers = [_number(group / file) for file in limits]
            limit = min((number for number in numbers if number is not None), default=None)
            used = _number(group / usage)
            if group.is_relative_to(base) and limit is not None and used is not None:
                cached = sum(_field(group / "memory.stat", name) for name in reclaimable)
                found.append((limit, max(0, limit - max(0, used - cached))))
    return found


def _field(path: Path, name: str) -> int:
    lines = (line.split() for line in text_of(path).splitlines())
    return next((int(words[1]) for words in lines if words[:1] == [name]), 0)


def _number(path: Path) -> int | None:
    """The number in a file; None for `max`, or if the file does not exist."""
    text = text_of(path).strip()
    return int(text) if text.isdecimal() else None


def text_of(path: Path) -> str:
    """The text of a file of the kernel; "" where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
