"""Groups of processes: started together, watched, and ended to the last one.

Each server runs in its own session and gets a signal if this process ends. Helpers of a server may
outlive it; this process adopts orphans (Linux's child subreaper), so it finds every process that a
server left behind, and ends only processes that it started.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def adopt_orphans() -> None:
    """Become the parent of descendants when their parent ends."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def start(argv: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A process in a session of its own; its output goes to `log`."""
    with log.open("ab") as out:
        return subprocess.Popen(
            list(argv),
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


def _parents() -> dict[int, int]:
    """Every process of this machine and its parent."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                stat = Path("/proc", entry, "stat").read_text()
                parents[int(entry)] = int(stat.rpartition(")")[2].split()[1])
    return parents


def descendants(roots: Sequence[int]) -> list[int]:
    """`roots` and all processes beneath them."""
    parents = _parents()
    found = [pid for pid in roots if pid in parents]
    for pid in found:  # grows while it is walked
        found.extend(child for child, parent in parents.items() if parent == pid)
    return list(dict.fromkeys(found))


def stop(processes: Sequence[subprocess.Popen[bytes]], grace_s: float = 20.0) -> None:
    """End these processes and all that they started: SIGTERM, then SIGKILL after `grace_s`."""
    pids = descendants([p.pid for p in processes])
    for process in reversed(processes):
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
    ours = set(descendants([os.getpid()])) - {os.getpid()}  # orphans of theirs are ours by now
    for pid in ours.intersection(pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in processes:
        process.wait()
    _reap(set(pids) - {p.pid for p in processes})


def _reap(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0 if Path(f"/proc/{pid}").exists() else os.WNOHANG)


def _usage(pid: int) -> dict[str, Any]:
    """What one process holds now; raises OSError if it has ended."""
    folder = Path("/proc", str(pid))
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    return {
        "name": (folder / "comm").read_text().strip(),
        "rss_bytes": int((folder / "statm").read_text().split()[1]) * _PAGE,
        "cpu_s": (int(fields[11]) + int(fields[12])) * _TICK_S,
        "num_threads": int(fields[17]),
        "num_fds": len(os.listdir(folder / "fd")),
    }


def _pss_bytes(pid: int) -> int:
    """Shared pages divided by their users; walks all pages, so not to be called under load."""
    for line in Path("/proc", str(pid), "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


def snapshot(roots: Sequence[int], with_pss: bool = False) -> dict[str, Any]:
    """Sums over the process tree at this moment, and the values of each process."""
    processes = []
    for pid in descendants(roots):
        with contextlib.suppress(OSError):
            usage = {"pid": pid, **_usage(pid)}
            if with_pss:
                usage["pss_bytes"] = _pss_bytes(pid)
            processes.append(usage)
    keys = ("rss_bytes", "cpu_s", "num_threads", "num_fds", *(("pss_bytes",) if with_pss else ()))
    return {"processes": processes, **{k: sum(p[k] for p in processes) for k in keys}}


@dataclass(slots=True)
class Watch:
    """Samples a tree from a thread while a run goes on."""

    roots: Sequence[int]
    every_s: float
    samples: list[dict[str, Any]] = field(default_factory=list)
    _end: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread:
            self._thread.join()

    def _run(self) -> None:
        while True:
            self.samples.append({"at_s": time.monotonic(), **snapshot(self.roots)})
            if self._end.wait(self.every_s):
                return

    @property
    def peak_rss_bytes(self) -> int:
        """The largest sum seen."""
        return max((sample["rss_bytes"] for sample in self.samples), default=0)
