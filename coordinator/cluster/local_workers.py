"""Workers that a coordinator starts on its own machine: they are restarted, and end with it.

    spawn --> running --exit--> backoff --> spawn ...        stop(): SIGTERM, a deadline, SIGKILL
                 '--exit with status 2--> fatal: trying again does not mend a bad configuration

Where a place has had a worker that lived, its configuration is valid: status 2 is then an exit like
any other, for the end of one worker must not end all. A process that cannot be started (no memory,
no descriptor) is tried again. A worker that hangs does not end: the watchdog kills it
(`coordinator.cluster.watchdog`).

Each worker writes to a log file of its own. `engine.process.parent_death` ties it to this process,
kill -9 included; for that workers are forked on the main thread (the event loop's).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from engine.base.errors import ConfigError
from engine.base.options import child_environment
from engine.base.types import Role
from engine.process.core_share import usable_cores
from engine.telemetry.log import get_logger

_log = get_logger(__name__)

BAD_CONFIGURATION = 2  # exit status of a command that cannot use its options
_FIRST_BACKOFF_S = 0.25
_MAX_BACKOFF_S = 10.0
_LAST_BYTES = 4096  # of a log, for its last line
_STABLE_S = 30.0  # a worker that lived this long starts over with the shortest backoff


def process_options(role: Role, cores: int, num_workers: int, *, alone: bool = False) -> list[str]:
    """Options of parent_death for a worker of `role`, one of `num_workers` on `cores`.

    Threads that wait for work must not spin on cores that another worker needs. Decode has priority
    over prefill: a slow prompt delays one answer, a slow step delays all of them. `alone`: all
    peers are on this machine, so UCX, which has no authentication, listens on loopback only.
    """
    threads = max(1, cores // max(1, num_workers))
    variables = [f"OMP_NUM_THREADS={threads}", "OMP_WAIT_POLICY=PASSIVE"]
    if alone:
        variables.append("UCX_NET_DEVICES=lo")
    nice = 5 if role is Role.PREFILL else 0
    return [f"--nice={nice}", *(f"--env={variable}" for variable in variables)]


@dataclass(slots=True, eq=False)
class LocalWorker:
    """One place for a worker, which one process after the other fills."""

    worker_id: str
    role: Role
    log_path: Path
    process: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0  # of the process, monotonic
    num_restarts: int = 0
    has_lived: bool = False  # longer than a worker with invalid options
    last_end: str = ""  # exit status and last line of the previous process; "": there was none


@dataclass(eq=False)
class Supervisor:
    """Keeps one process a place running. `command` gives module and arguments of a worker."""

    places: Sequence[tuple[str, Role]]
    log_dir: Path
    command: Callable[[str, Role], Sequence[str]]
    process_options: Callable[[Role, int, int], Sequence[str]] = process_options
    # By worker: variables that override the user's (its GPU).
    assigned: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fatal: asyncio.Future[ConfigError] = field(default_factory=asyncio.Future)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.workers = [
            LocalWorker(name, role, self.log_dir / f"{name}.log") for name, role in self.places
        ]

    def start(self) -> None:
        """Start all workers. Raises ConfigError where the folder for logs cannot be made."""
        try:
            self.log_dir.mkdir(parents=True, exist_ok=True)
            for worker in self.workers:
                worker.log_path.write_bytes(b"")
        except OSError as error:
            raise ConfigError(f"--log-dir {self.log_dir}: {error.strerror}") from None
        self._tasks = [asyncio.create_task(self._keep(worker)) for worker in self.workers]

    async def stop(self, grace_s: float = 10.0) -> None:
        """Send SIGTERM to all workers, and SIGKILL to those that run after `grace_s`."""
        self._stop.set()
        self._signal_all(signal.SIGTERM)
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=grace_s)
            if late:
                self._signal_all(signal.SIGKILL)
                await asyncio.wait(late, timeout=5.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _signal_all(self, number: signal.Signals) -> None:
        for worker in self.workers:
            if worker.process and worker.process.poll() is None:
                worker.process.send_signal(number)

    async def _keep(self, worker: LocalWorker) -> None:
        """Run one place until the end."""
        backoff_s = _FIRST_BACKOFF_S
        while True:
            started_s = time.monotonic()
            try:
                status = await self._run_once(worker)
            except OSError as error:
                _log.error(
                    "local worker cannot be started",
                    worker=worker.worker_id,
                    reason=str(error),
                    restart_in_s=backoff_s,
                )
                status = None
            if self._stop.is_set():
                return
            if status == BAD_CONFIGURATION and not worker.has_lived:
                line = _last_line(worker)
                what = f": {line}" if line else f" cannot use its options; see {worker.log_path}"
                if not self.fatal.done():
                    self.fatal.set_result(ConfigError(worker.worker_id + what))
                return
            if time.monotonic() - started_s > _STABLE_S:
                worker.has_lived = True
                backoff_s = _FIRST_BACKOFF_S
            if status is not None:
                line = _last_line(worker)
                worker.last_end = f"status {status}: {line}" if line else f"status {status}"
                _log.warning(
                    "local worker ended",
                    worker=worker.worker_id,
                    status=status,
                    restart_in_s=backoff_s,
                    said=line,
                    log=str(worker.log_path),
                )
            try:
                await asyncio.wait_for(self._stop.wait(), backoff_s)
                return
            except TimeoutError:
                pass
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
            worker.num_restarts += 1

    async def _run_once(self, worker: LocalWorker) -> int:
        """One process from start to exit status; negative: the signal that ended it.

        Raises OSError where it cannot be started or watched; no process is left then.
        """
        worker.started_s = time.monotonic()
        with _open_log(worker) as log:
            process = worker.process = self._spawn(worker, log)
        _log.info("local worker started", worker=worker.worker_id, pid=process.pid)
        try:
            await _ended(process)
        except OSError:
            process.kill()
            process.wait()
            raise
        return process.wait()

    def _spawn(self, worker: LocalWorker, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """Fork on this thread. Popen does it by vfork, which gRPC's fork handlers do not see."""
        options = self.process_options(worker.role, usable_cores(), len(self.workers))
        arguments = ["--parent", str(os.getpid()), *options]
        command = self.command(worker.worker_id, worker.role)
        return subprocess.Popen(
            [sys.executable, "-m", "engine.process.parent_death", *arguments, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**child_environment(), **self.assigned.get(worker.worker_id, {})},
            # Ctrl-C in a terminal ends the coordinator, which ends its workers. The session stays:
            # where the kernel shares cores by session (sched_autogroup), niceness has no effect
            # between two sessions.
            process_group=0,
        )


def _open_log(worker: LocalWorker) -> IO[bytes]:
    """The worker's log file, or /dev/null where it cannot be opened."""
    try:
        worker.log_path.parent.mkdir(parents=True, exist_ok=True)
        return worker.log_path.open("ab")
    except OSError as error:
        _log.error("local worker has no log", worker=worker.worker_id, reason=str(error))
        return open(os.devnull, "ab")


async def _ended(process: subprocess.Popen[bytes]) -> None:
    """Until the process has ended; it is not reaped."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    descriptor = os.pidfd_open(process.pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def doing(worker: LocalWorker) -> str:
    """How the previous process ended, or what the first one logged last; "" without JSON lines.

    For example "warm-up begins: decode".
    """
    if worker.last_end:
        return f"restart {worker.num_restarts} after {worker.last_end}"
    try:
        with worker.log_path.open("rb") as log:
            log.seek(max(0, worker.log_path.stat().st_size - _LAST_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        with suppress(ValueError, TypeError, AttributeError, KeyError):
            entry = json.loads(line)
            step = entry.get("step")
            return f"{entry['event']}: {step}" if step else str(entry["event"])
    return ""


def _last_line(worker: LocalWorker) -> str:
    """The last line that is not a log entry; "" without one."""
    try:
        lines = worker.log_path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    plain = [line.strip() for line in lines if line.strip() and not line.startswith("{")]
    return plain[-1] if plain else ""
