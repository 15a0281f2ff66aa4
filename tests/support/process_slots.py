"""Processes that come back: one place each, with its name, its ports and its log file.

    spawn --> running --end--> noted (wanted by a test, or not) --> spawn again, unless held

A supervisor thread starts all of them, for `engine.process.parent_death` ties each to the thread
that forked it. An end that no test asked for is kept with its status: `unwanted_ends` must stay
empty.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.paths import ROOT

_TICK_S = 0.01
_BACKOFF_S = 0.25
_STOP_S = 15.0


@dataclass(frozen=True, slots=True)
class End:
    """How one process of a place ended; a negative status is a signal."""

    status: int
    wanted: bool


@dataclass(eq=False)
class ProcessSlot:
    """One place. `module` is run by `python -m`."""

    name: str
    module: str
    args: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    prefix: Sequence[str] = ()
    held: bool = True  # nothing is started here for now
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    ends: list[End] = field(default_factory=list)
    wanted: bool = False  # the next end is a test's doing
    stopped: bool = False

    @property
    def pid(self) -> int:
        """Of the process in it now."""
        assert self.process is not None, f"{self.name} never started"
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether a process is in it."""
        return self.process is not None and self.process.poll() is None

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the process by a signal; it comes back unless the place is held."""
        self.wanted = True
        os.kill(self.pid, number)

    def freeze(self) -> None:
        """SIGSTOP, and wait until the kernel has stopped it."""
        os.kill(self.pid, signal.SIGSTOP)
        self.stopped = True
        deadline = time.monotonic() + 5
        while self._state() != "T":
            assert time.monotonic() < deadline, f"{self.name} does not stop"
            time.sleep(0.001)

    def thaw(self) -> None:
        """SIGCONT."""
        if self.stopped and self.alive:
            os.kill(self.pid, signal.SIGCONT)
        self.stopped = False

    def usage(self) -> dict[str, int]:
        """Threads, descriptors and resident bytes of the process."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        return {
            "threads": int(fields["Threads"]),
            "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
            "resident_bytes": int(fields["VmRSS"].split()[0]) << 10,
        }

    def _state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]


class Keeper:
    """The supervisor of all places of a cluster."""

    def __init__(self, on_start: Callable[[str, int], None]) -> None:
        """`on_start` gets the name and pid of each new process."""
        self.places: list[ProcessSlot] = []
        self._on_start = on_start
        self._closing = False
        self._not_before: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    def add(self, place: ProcessSlot) -> None:
        """Look after one more."""
        self.places = [*self.places, place]

    def close(self) -> None:
        """End everything: SIGTERM, a while, SIGKILL."""
        for place in self.places:
            place.held = place.wanted = True
            place.thaw()
        for number, wait_s in ((signal.SIGTERM, _STOP_S), (signal.SIGKILL, 5.0)):
            for place in self.places:
                if place.alive:
                    os.kill(place.pid, number)
            deadline = time.monotonic() + wait_s
            while any(p.alive for p in self.places) and time.monotonic() < deadline:
                time.sleep(_TICK_S)
        self._closing = True
        self._thread.join(5)
        left = [p.name for p in self.places if p.alive]
        assert not left, f"still running: {left}"

    def _run(self) -> None:
        while not self._closing:
            for place in self.places:
                if place.process is not None and place.process.poll() is not None:
                    self._note_end(place)
                if place.process is None and not place.held and self._may_start(place):
                    _spawn(place)
                    self._on_start(place.name, place.pid)
            time.sleep(_TICK_S)

    def _may_start(self, place: ProcessSlot) -> bool:
        return time.monotonic() >= self._not_before.get(place.name, 0.0)

    def _note_end(self, place: ProcessSlot) -> None:
        assert place.process is not None
        place.ends.append(End(place.process.returncode, place.wanted))
        place.wanted = place.stopped = False
        place.process = None
        self._not_before[place.name] = time.monotonic() + _BACKOFF_S


def _spawn(place: ProcessSlot) -> None:
    lifeline = ["-m", "engine.process.parent_death", "--parent", str(os.getpid())]
    command = [*place.prefix, sys.executable, *lifeline, place.module, *place.args]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DIPTYCH_")}
    for name in ("DIPTYCH_CACHE_DIR", "DIPTYCH_STATE_DIR"):
        if name in os.environ:
            environment[name] = os.environ[name]
    with place.log.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env={**environment, "OMP_WAIT_POLICY": "PASSIVE", **place.env},
            process_group=0,  # one session, as under a coordinator
        )
    place.started_s = time.monotonic()
    place.process = process
