"""How much of the host's memory is left to take, and what bounds it. No torch here.

    available = min(MemAvailable, limit - what cannot be reclaimed, of each control group)

A page cache can be reclaimed: free memory would shrink with every file that is read. Active pages
of a group's files count, too: a model that is read at each start is active.

A coordinator asks once, and deals what there is to its local workers (`share`): two workers that
ask at the same moment would both count memory that the other one has not touched yet, and a worker
that starts again would count what its neighbours have taken since.
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


def shown(num_bytes: int) -> str:
    """A size for people.

    >>> shown(192 << 20), shown(3 << 29)
    ('192 MiB', '1.5 GiB')
    """
    for unit, name in _UNITS:
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f}".removesuffix(".0") + f" {name}"
    return f"{num_bytes} bytes"


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes that may be taken, and what bounds them, such as "the cgroup's 2 GiB"."""

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
        """From BYTES:LIMIT; None from nothing. Raises ConfigError."""
        number, _, limit = text.partition(":")
        if not text:
            return None
        if not number.isdecimal() or not limit:
            raise ConfigError(f"--memory-share {text}: expected BYTES:LIMIT")
        return cls(int(number), limit)


def host_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> HostMemory:
    """What this process may still take."""
    available = _available(proc / "meminfo")
    found = HostMemory(available, f"the machine's {shown(available)} of available memory")
    for limit, left in _cgroup_limits(proc / "self/cgroup", cgroups):
        if left < found.available_bytes:
            found = HostMemory(left, f"the cgroup's {shown(limit)}")
    return found


def _available(meminfo: Path) -> int:
    """MemAvailable counts what the kernel can reclaim; kernels before 3.14 do not have it."""
    lines = (line.split() for line in _text(meminfo).splitlines())
    kib = {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}
    fallback = kib.get("MemFree:", 0) + kib.get("Cached:", 0)
    return kib.get("MemAvailable:", fallback) * 1024


def _cgroup_limits(own: Path, root: Path) -> list[tuple[int, int]]:
    """(limit, bytes left) of this process's groups and all their parents, v2 and v1.

    A container may see the path that its group has on the host while its own group is mounted as
    the root: what does not exist is passed by.
    """
    found = []
    for line in _text(own).splitlines():
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
        for place in (folder, *folder.parents):
            numbers = [_number(place / file) for file in limits]
            limit = min((number for number in numbers if number is not None), default=None)
            used = _number(place / usage)
            if place.is_relative_to(base) and limit is not None and used is not None:
                cached = sum(_field(place / "memory.stat", name) for name in reclaimable)
                found.append((limit, max(0, limit - max(0, used - cached))))
    return found


def _field(path: Path, name: str) -> int:
    lines = (line.split() for line in _text(path).splitlines())
    return next((int(words[1]) for words in lines if words[:1] == [name]), 0)


def _number(path: Path) -> int | None:
    """A file's number; None for `max`, and where there is no such file."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
