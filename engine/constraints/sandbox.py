"""Jobs for the processes of runner.py, and how each of them ended. One keeper a sandbox.

    submit -> queue of a lane -> its thread: send, wait -> Outcome
                                    | the job is abandoned: the runner is killed
                                    | the keeper is lost: it is started again

Jobs are tried for an instant first, as nearly all of them are done then; later, and when no other
one waits for its first try, for longer, and at last in the slow lane. So many jobs that take long
hold up the others by that instant each.
"""

from __future__ import annotations

import itertools
import os
import pickle
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

from llguidance import LLTokenizer

from engine.constraints.grammar import Grammar, Vocabulary
from engine.constraints.runner import HEAD, KILL, REPLY, Done, Job, read_all, write_all
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
_NUM_QUICK, _NUM_SLOW = 2, 1
_POLL_S = 0.05  # within which an abandoned job ends
_SILENT_S = 10.0  # a keeper that does not answer a kill for so long is lost
_READS_S = 60.0  # the same within a job or a result, of a keeper that may just have started
_RESTART_S = 1.0  # least time between two starts
_NICENESS = 5  # steps and messages go first


class Ended(Enum):
    """How a job ended."""

    DONE = "done"
    CPU_TIME = "cpu_time"
    MEMORY = "memory"
    DEPTH = "depth"  # its stack was used up
    LOST = "lost"  # killed from outside, or abandoned


_SIGNALS = {
    signal.SIGPROF: Ended.CPU_TIME,
    signal.SIGABRT: Ended.MEMORY,
    signal.SIGSEGV: Ended.DEPTH,
    signal.SIGBUS: Ended.DEPTH,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a job; the grammar where it was done."""

    ended: Ended
    grammar: Grammar | None = None
    cpu_s: float = 0.0


@dataclass(slots=True)
class Trial:
    """A job that was submitted."""

    job: Job
    cpu_s: float
    future: Future[Outcome] = field(default_factory=Future)
    abandoned: bool = False

    def abandon(self) -> None:
        """End the job soon, wherever it is."""
        self.abandoned = True
        self.future.cancel()


# Jobs that may take less CPU time come first.
_Queue = queue.PriorityQueue[tuple[float, int, Trial | None]]


def _nothing(_tokenizer: LLTokenizer) -> Grammar:
    return Grammar()


class Sandbox:
    """Owns the keeper and a thread a lane. Usable from any thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._keeper: subprocess.Popen[bytes] | None = None
        self._sockets: list[socket.socket] = []
        self._started_s = -_RESTART_S
        self._closed = False
        self._count = itertools.count()
        self._quick: _Queue = queue.PriorityQueue()
        self._slow: _Queue = queue.PriorityQueue()
        queues = [self._quick] * _NUM_QUICK + [self._slow] * _NUM_SLOW
        for lane, jobs in enumerate(queues):
            threading.Thread(
                target=self._serve, args=(lane, jobs), name="constraints", daemon=True
            ).start()

    def prepare(self) -> None:
        """Start the processes, which the first job would wait for: about a second."""
        self.submit(_nothing, 1.0)

    def submit(self, job: Job, cpu_s: float, *, slow: bool = False) -> Trial:
        """Run a picklable call; its future never fails."""
        trial = Trial(job, cpu_s)
        (self._slow if slow else self._quick).put((cpu_s, next(self._count), trial))
        return trial

    def close(self) -> None:
        """End all processes and threads; jobs under way are lost."""
        self._closed = True
        for lane in range(_NUM_QUICK + _NUM_SLOW):
            jobs = self._quick if lane < _NUM_QUICK else self._slow
            jobs.put((-1.0, next(self._count), None))
        with self._lock:
            self._end()

    def _serve(self, lane: int, jobs: _Queue) -> None:
        while (trial := jobs.get()[2]) is not None:
            if not trial.future.set_running_or_notify_cancel():
                continue
            try:
                outcome = self._outcome(lane, trial)
            except Exception as error:
                _log.error("a job of constraints failed", reason=repr(error))
                outcome = Outcome(Ended.LOST)
            trial.future.set_result(outcome)

    def _outcome(self, lane: int, trial: Trial) -> Outcome:
        try:
            sock = self._socket(lane)
        except OSError as error:
            _log.warning("the processes of constraints do not start", reason=str(error))
            return Outcome(Ended.LOST)
        try:
            call = pickle.dumps(trial.job)
            write_all(sock.fileno(), HEAD.pack(trial.cpu_s, len(call)) + call)
            self._wait(sock, trial)
            status, size = REPLY.unpack(read_all(sock.fileno(), REPLY.size))
            result = read_all(sock.fileno(), size)
        except (OSError, EOFError) as error:
            self._lose(sock, str(error) or "it ended")
            return Outcome(Ended.LOST)
        if status:
            return Outcome(_SIGNALS.get(signal.Signals(-status), Ended.LOST), cpu_s=trial.cpu_s)
        done = pickle.loads(result)
        assert isinstance(done, Done)
        return Outcome(Ended.DONE, done.grammar, done.cpu_s)

    def _wait(self, sock: socket.socket, trial: Trial) -> None:
        """Until there is a reply. Raises TimeoutError where an abandoned job does not end."""
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        until_s = 0.0
        while not poll.poll(1000 * _POLL_S):
            if not trial.abandoned:
                continue
            if not until_s:
                until_s = time.monotonic() + _SILENT_S
                write_all(sock.fileno(), KILL)
            elif time.monotonic() > until_s:
                raise TimeoutError("it does not answer")

    # -- the keeper --------------------------------------------------------------------------------

    def _socket(self, lane: int) -> socket.socket:
        with self._lock:
            if self._closed:
                raise OSError("closed")
            if self._keeper is None:
                time.sleep(max(0.0, self._started_s + _RESTART_S - time.monotonic()))
                self._start()
            return self._sockets[lane]

    def _start(self) -> None:
        """Start a keeper; it is tied to this thread, which lives as long as the sandbox."""
        self._started_s = time.monotonic()
        pairs = [socket.socketpair() for _ in range(_NUM_QUICK + _NUM_SLOW)]
        theirs = [pair[1].fileno() for pair in pairs]
        vocabulary = self._vocabulary
        command = [sys.executable, "-m", "engine.process.parent_death", f"--parent={os.getpid()}"]
        command += [f"--nice={_NICENESS}", "--env=OPENBLAS_NUM_THREADS=1", "engine.constraints"]
        command += [str(vocabulary.folder), str(vocabulary.size)]
        command += [",".join(map(str, vocabulary.eos_token_ids)), ",".join(map(str, theirs))]
        try:
            self._keeper = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=theirs,
            )
            self._sockets = [pair[0] for pair in pairs]
            for sock in self._sockets:  # a keeper may stop while it reads a job, or writes a result
                for limit in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                    sock.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", int(_READS_S), 0))
        finally:
            for pair in pairs:
                pair[1].close()

    def _lose(self, sock: socket.socket, reason: str) -> None:
        """End a keeper that is of no use; the next job starts another one."""
        with self._lock:
            if sock in self._sockets and not self._closed:
                _log.warning("the processes of constraints are lost", reason=reason)
                self._end()

    def _end(self) -> None:
        if self._keeper is None:
            return
        self._keeper.kill()
        self._keeper.wait()
        self._keeper = None
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes its lane; the lane's next socket is new
        self._sockets = []
