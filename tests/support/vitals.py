"""What a process must look the same in before and after: descriptors, threads, memory; and a
bystander, which sends an ordinary request all the while and needs the right answer in time.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

MIB = 1024 * 1024
# gRPC keeps a few threads and descriptors for a while after they were needed.
MORE_FILES, MORE_THREADS = 24, 8


@dataclass(frozen=True, slots=True)
class Vitals:
    """One process at one moment."""

    num_files: int
    num_threads: int
    resident_bytes: int

    def grew(self, since: Vitals, growth_bytes: int) -> bool:
        """Whether the process kept more than comes and goes."""
        return (
            self.num_files > since.num_files + MORE_FILES
            or self.num_threads > since.num_threads + MORE_THREADS
            or self.resident_bytes > since.resident_bytes + growth_bytes
        )


def vitals(pid: int) -> Vitals:
    """Of a live process."""
    status = Path(f"/proc/{pid}/status").read_text()
    numbers = {key: int(value) for key, value in re.findall(r"^(\w+):\s+(\d+)", status, re.M)}
    return Vitals(
        num_files=sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
        num_threads=numbers["Threads"],
        resident_bytes=numbers["VmRSS"] * 1024,
    )


class PeakMemory:
    """The largest memory of processes while a block runs; `sizes` measures them, bytes by name."""

    def __init__(self, sizes: Callable[[], Mapping[str, int]], interval_s: float = 0.05) -> None:
        self._sizes = sizes
        self._interval_s = interval_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._first = dict(sizes())
        self._peak = dict(self._first)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()

    def growth(self) -> dict[str, int]:
        """Bytes above the first measurement."""
        return {name: peak - self._first.get(name, 0) for name, peak in self._peak.items()}

    def _run(self) -> None:
        while not self._over.wait(self._interval_s):
            for name, size in self._sizes().items():
                self._peak[name] = max(self._peak.get(name, 0), size)


@dataclass
class Bystander:
    """Calls `ask` again and again in a thread; `check()` has the result."""

    ask: Callable[[], object]
    expected: object
    limit_s: float
    seconds: list[float] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join(2 * self.limit_s)

    def check(self) -> None:
        """After the block: at least one answer, all right, all in time."""
        assert not self._thread.is_alive(), "an unrelated request never ended"
        assert not self.complaints, f"unrelated requests were harmed: {self.complaints[:5]}"
        assert self.seconds, "no unrelated request was asked"
        slowest = max(self.seconds)
        assert slowest < self.limit_s, (
            f"an unrelated request took {slowest:.1f} s, the limit is {self.limit_s:.1f} s"
        )

    def _run(self) -> None:
        while True:
            begun_s = time.monotonic()
            try:
                answer = self.ask()
            except Exception as error:  # any error is what we are here to see
                self.complaints.append(repr(error))
            else:
                if answer != self.expected:
                    self.complaints.append(f"{answer!r} instead of {self.expected!r}")
            self.seconds.append(time.monotonic() - begun_s)
            if self._over.is_set():
                return
