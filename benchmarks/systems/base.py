"""The interface of a system under measurement, and its start and end.

A system describes its launch for given needs. The rest is common: start its commands in order, wait
until it answers, run plans with its loader, end its process group.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import processes
from benchmarks.plan import Endpoint, Plan, PlannedLane, Result
from benchmarks.workloads import Needs, Speculation, Workload

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "benchmarks" / ".peers"
_LOADER = (sys.executable, "-m", "benchmarks.load")
_LOADER_GRACE_S = 60.0


class NotReady(Exception):
    """A system ended, or was not ready in time."""


@dataclass(frozen=True, slots=True)
class Command:
    """One process of a system."""

    name: str  # of its log
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Launch:
    """How a system is brought up."""

    endpoint: Endpoint
    commands: tuple[Command, ...] = ()
    is_ready: Callable[[], bool] = lambda: True
    ready_s: float = 900.0  # a first start may compile
    loader: tuple[str, ...] = _LOADER
    counters: Callable[[], dict[str, float]] = dict  # its own metrics, read before and after a run


@dataclass(frozen=True, slots=True)
class System:
    """A name, what it takes part in, and its launch."""

    name: str
    title: str
    launch: Callable[[Needs, Path], Launch]  # needs, folder for its files
    missing: Callable[[], str]  # why it cannot run here; "" if it can
    speculative: bool = False
    only: tuple[str, ...] = ()  # workloads that it is measured on; (): all
    not_on: tuple[str, ...] = ()

    def takes(self, workload: Workload) -> bool:
        """Whether it is measured on `workload`."""
        if workload.speculation is Speculation.OFF and self.speculative:
            return False
        if workload.name in self.not_on:
            return False
        return not self.only or workload.name in self.only


@dataclass(frozen=True, slots=True)
class Running:
    """A system that answers."""

    launch: Launch
    roots: tuple[int, ...]
    folder: Path
    start_s: float  # from launch to ready

    def play(self, lanes: tuple[PlannedLane, ...], limit_s: float, every_s: float) -> Played:
        """One run by the loader, in a process of its own. Raises CalledProcessError."""
        plan, out = self.folder / "plan.json", self.folder / "result.json"
        Plan(self.launch.endpoint, lanes, limit_s).write(plan)
        out.unlink(missing_ok=True)
        before, cpu_s = self.launch.counters(), self._cpu_s()
        log = self.folder / "loader.log"
        env = {"PYTHONPATH": str(ROOT)}
        loader = processes.start((*self.launch.loader, str(plan), str(out)), env, log)
        try:
            with processes.Watch(self.roots or (loader.pid,), every_s) as watch:
                status = loader.wait(limit_s + _LOADER_GRACE_S)
        finally:
            processes.stop([loader], grace_s=5.0)
        if status != 0:
            raise subprocess.CalledProcessError(status, loader.args, log.read_text()[-2000:])
        after = self.launch.counters()
        return Played(
            result=Result.read(out),
            counters={key: value - before.get(key, 0.0) for key, value in after.items()},
            server_cpu_s=self._cpu_s() - cpu_s,
            peak_rss_bytes=watch.peak_rss_bytes,
            at_rest=processes.snapshot(self.roots, with_pss=True),
            samples=watch.samples,
        )

    def _cpu_s(self) -> float:
        return float(processes.snapshot(self.roots)["cpu_s"])


@dataclass(frozen=True, slots=True)
class Played:
    """One run and what was seen of the processes meanwhile."""

    result: Result
    counters: dict[str, float]
    server_cpu_s: float
    peak_rss_bytes: int
    at_rest: dict[str, Any]
    samples: list[dict[str, Any]]


@contextmanager
def running(system: System, needs: Needs, folder: Path) -> Iterator[Running]:
    """The system, up; ended on leaving. Raises NotReady."""
    folder.mkdir(parents=True, exist_ok=True)
    started: list[subprocess.Popen[bytes]] = []
    begin_s = time.monotonic()
    try:
        launch = system.launch(needs, folder)
        for command in launch.commands:
            log = folder / f"{command.name}.log"
            started.append(processes.start(command.argv, command.env, log))
        _wait_ready(system, launch, started)
        roots = tuple(process.pid for process in started)
        yield Running(launch, roots, folder, time.monotonic() - begin_s)
    finally:
        processes.stop(started)


def _wait_ready(system: System, launch: Launch, started: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + launch.ready_s
    while not launch.is_ready():
        if any(process.poll() is not None for process in started):
            raise NotReady(f"{system.name} ended while starting; see its log")
        if time.monotonic() > deadline:
            raise NotReady(f"{system.name} did not answer within {launch.ready_s:.0f} s")
        time.sleep(0.25)


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def http_ok(*urls: str) -> bool:
    """Whether all answer 200."""
    for url in urls:
        try:
            with urllib.request.urlopen(url, timeout=2.0) as response:
                if response.status != 200:
                    return False
        except OSError:
            return False
    return True


def scrape(urls: tuple[str, ...], wanted: tuple[str, ...]) -> dict[str, float]:
    """Samples of Prometheus text whose names start with one of `wanted`, summed over `urls`."""
    totals: dict[str, float] = {}
    for url in urls:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5.0) as response:
            for line in response.read().decode().splitlines():
                if line.startswith(wanted) and "_created" not in line:
                    name, _, value = line.rpartition(" ")
                    totals[name] = totals.get(name, 0.0) + float(value)
    return totals
