"""Processes that come back: one place each, with its name, its ports and its log file.

    spawn --> running --end--> noted (wanted by a test, or not) --> spawn again, unless held

A supervisor thread starts all of them, for `engine.process.parent_death` ties each to the thread
that forked it; a fork server stands between (fork_server.py), but for a process in a network
namespace. The status of each end is kept, and whether a test asked for it.
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

from tests.support.fork_server import ForkedProcess, ForkServer
from tests.support.paths import ROOT

_TICK_S = 0.01
_BACKOFF_S = 0.25
_STOP_S = 15.0
_KEPT = ("DIPTYCH_CACHE_DIR", "DIPTYCH_STATE_DIR")
# What `start` imports when it has read its options, and the variables that it sets before.
_COORDINATOR = ("coordinator.process", "coordinator.server", "uvloop")
_WORKER = ("engine.step.build", "kvtransfer.connections", "worker.run", "uvloop")
_ENV = {_COORDINATOR: {"GRPC_VERBOSITY": "ERROR"}, _WORKER: {"TOKENIZERS_PARALLELISM": "false"}}


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
    process: subprocess.Popen[bytes] | ForkedProcess | None = None
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
        self._servers: dict[tuple[object, ...], ForkServer] = {}
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)
        self._thread.start()

    def add(self, place: ProcessSlot) -> None:
        """Look after one more."""
        self.places = [*self.places, place]

    def remove(self, place: ProcessSlot) -> None:
        """Start nothing there any more."""
        place.held = True
        self.places = [p for p in self.places if p is not place]

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
        try:
            self._supervise()
        finally:
            for server in self._servers.values():
                server.close()

    def _supervise(self) -> None:
        while not self._closing:
            for place in self.places:
                if place.process is not None and (status := place.process.poll()) is not None:
                    self._note_end(place, status)
                if place.process is None and not place.held and self._may_start(place):
                    process = self._spawn(place)
                    place.started_s = time.monotonic()
                    place.process = process
                    self._on_start(place.name, place.pid)
            time.sleep(_TICK_S)

    def _may_start(self, place: ProcessSlot) -> bool:
        return time.monotonic() >= self._not_before.get(place.name, 0.0)

    def _note_end(self, place: ProcessSlot, status: int) -> None:
        place.ends.append(End(status, place.wanted))
        place.wanted = place.stopped = False
        place.process = None
        self._not_before[place.name] = time.monotonic() + _BACKOFF_S

    def _spawn(self, place: ProcessSlot) -> subprocess.Popen[bytes] | ForkedProcess:
        env = {k: v for k, v in os.environ.items() if k in _KEPT or not k.startswith("DIPTYCH_")}
        env |= {"OMP_WAIT_POLICY": "PASSIVE", **place.env}
        if not place.prefix:
            modules = _COORDINATOR if place.module.startswith("coordinator") else _WORKER
            key = (modules, *sorted(place.env.items()))
            if key not in self._servers:
                self._servers[key] = ForkServer(modules, {**_ENV[modules], **env})
            return self._servers[key].start(place.module, place.args, place.log)
        lifeline = ["-m", "engine.process.parent_death", "--parent", str(os.getpid())]
        with place.log.open("ab") as log:
            return subprocess.Popen(
                [*place.prefix, sys.executable, *lifeline, place.module, *place.args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=env,
                process_group=0,  # one session, as under a coordinator
            )
