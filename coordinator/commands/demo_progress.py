"""Shows the start of a stack in `make demo`, and distinguishes slow from stuck."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

_SILENT_S = 4.0
_MOVED_S = 0.1  # CPU time of progress: a process that only polls uses less


class StackOutput:
    """Prints the lines of a coordinator's output that are no log lines.

    During silence it prints a line with the elapsed time.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self.last = ""
        self._clock = clock
        self._began_s = self._shown_s = clock()
        self._path = path
        self._read = 0
        self._rest = b""

    def show(self) -> None:
        """Print new lines."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for raw in lines:
            line = raw.decode(errors="replace").strip()
            if line and not line.startswith("{"):
                self.last = line
                self._print(line)
        if self._clock() - self._shown_s >= _SILENT_S:
            self._print(f"starting, {self._clock() - self._began_s:.0f} s")

    def _print(self, line: str) -> None:
        self._shown_s = self._clock()
        print(f"  {line}", flush=True)


class Stillness:
    """Measures for how long no log has grown and no process of the stack has computed."""

    def __init__(self, pid: int, log_dir: Path, clock: Callable[[], float]) -> None:
        self._pid = pid
        self._log_dir = log_dir
        self._clock = clock
        self._moved_s = clock()
        self._seen = self._look()

    def seconds(self) -> float:
        """Seconds since the last progress."""
        size, cpu_s = self._look()
        if size != self._seen[0] or abs(cpu_s - self._seen[1]) > _MOVED_S:
            self._seen = size, cpu_s
            self._moved_s = self._clock()
        return self._clock() - self._moved_s

    def _look(self) -> tuple[int, float]:
        sizes = sum(p.stat().st_size for p in self._log_dir.glob("*.log") if p.exists())
        return sizes, cpu_seconds(self._pid)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of all its running descendants."""
    times: dict[int, tuple[int, int]] = {}  # pid: (parent, ticks)
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                text = Path(entry.path, "stat").read_text(errors="replace")
            except OSError:
                continue
            fields = text.rpartition(")")[2].split()
            times[int(entry.name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    family = {pid}
    while more := {p for p, (parent, _) in times.items() if parent in family} - family:
        family |= more
    ticks = sum(times[p][1] for p in family if p in times)
    return ticks / os.sysconf("SC_CLK_TCK")
