"""Kills local workers that hang: processes that run and send no heartbeat.

    started --registers--> reports --silent for hang_s--> killed; the supervisor starts it again
       '---- nothing for start_s ---------------------------^

Silence has other reasons than the worker. This process or the whole machine may have been stopped:
a look that comes late starts all measurements again. A worker under a debugger is not killed. One
place is killed at a time: where its successor registers, the others that are silent hang too; where
it does not, the fault may be on this side of the stream.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from coordinator.cluster.local_workers import LocalWorker
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
_LOOK_S = 1.0
_LATE_S = 3.0  # a look that is so late: this process was stopped
_SUCCESSOR_S = 60.0  # time of a successor to register before the next place is judged


@dataclass(slots=True)
class _Process:
    """What is known of the process in a place."""

    pid: int
    heard_s: float  # its start, its last heartbeat, or the end of a pause of this process
    registered: bool = False
    traced: bool = False


@dataclass(eq=False)
class Watchdog:
    """Looks at the places of a supervisor. Lives on the event loop."""

    workers: Sequence[LocalWorker]
    # `last_beat_s(worker_id, since_s)`: the last heartbeat (monotonic) of a process of that place
    # that registered after `since_s`; None: there is none.
    last_beat_s: Callable[[str, float], float | None]
    hang_s: float  # 0: no limit
    start_s: float  # 0: no limit
    on_hang: Callable[[str], None] = lambda worker_id: None
    clock: Callable[[], float] = time.monotonic
    _known: dict[str, _Process] = field(default_factory=dict)
    _replacing: tuple[str, int, float] | None = None  # place, pid killed, when

    def __post_init__(self) -> None:
        self._looked_s = self.clock()

    async def run(self) -> None:
        """Look once a second until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            self.look()

    def look(self) -> None:
        """Kill a process that has been silent for too long; one place at most."""
        now = self.clock()
        late_s = now - self._looked_s - _LOOK_S
        self._looked_s = now
        seen = [(worker, self._process(worker)) for worker in self.workers]
        if late_s > _LATE_S:
            _log.warning("this process was paused; silence is measured anew", for_s=round(late_s))
            for _, process in seen:
                if process is not None:
                    process.heard_s = now
        self._end_replacing(now)
        for worker, process in seen:
            if process is not None and self._replacing is None:
                self._judge(worker, process, now)

    def _process(self, worker: LocalWorker) -> _Process | None:
        """The process in a place, with its last heartbeat; None while there is none."""
        popen = worker.process
        if popen is None or popen.poll() is not None:
            return None
        known = self._known.get(worker.worker_id)
        if known is None or known.pid != popen.pid:
            known = self._known[worker.worker_id] = _Process(popen.pid, worker.started_s)
        beat_s = self.last_beat_s(worker.worker_id, worker.started_s)
        if beat_s is not None:
            known.registered = True
            known.heard_s = max(known.heard_s, beat_s)
        return known

    def _judge(self, worker: LocalWorker, process: _Process, now: float) -> None:
        bound_s = self.hang_s if process.registered else self.start_s
        silent_s = now - process.heard_s
        if not bound_s or silent_s < bound_s:
            return
        if _is_traced(process.pid):
            if not process.traced:
                _log.warning("a silent local worker is under a debugger", worker=worker.worker_id)
            process.traced = True
            return
        _log.error(
            "local worker hangs; killing it",
            worker=worker.worker_id,
            pid=process.pid,
            silent_s=round(silent_s, 1),
            registered=process.registered,
            flag="--worker-hang-s" if process.registered else "--worker-start-s",
        )
        self.on_hang(worker.worker_id)
        self._replacing = worker.worker_id, process.pid, now
        assert worker.process is not None, "a place without a process is not judged"
        worker.process.kill()

    def _end_replacing(self, now: float) -> None:
        """Judge other places again when the successor has registered, or its time is over."""
        if self._replacing is None:
            return
        worker_id, pid, killed_s = self._replacing
        known = self._known.get(worker_id)
        back = known is not None and known.pid != pid and known.registered
        if back or now - killed_s > _SUCCESSOR_S:
            self._replacing = None


def _is_traced(pid: int) -> bool:
    """Whether a debugger is attached to the process."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("TracerPid:"):
                return line.split()[1] != "0"
    return False
