"""Runs jobs in the processes of runner.py, and reports how each ended. One fork server a sandbox.

    submit -> queue -> thread of a slot: send, wait -> Outcome
                         | job abandoned: the runner is killed
                         | fork server lost: it is started again

Jobs with a smaller CPU limit come first. Nearly all jobs end within the first, short limit; longer
ones are submitted again with a larger limit, and at last to the slow slot. So a long job delays
the others only by the short limit.
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
_POLL_S = 0.05  # interval of the check for an abandoned job
_SILENT_S = 10.0  # without a response to KILL for so long the fork server is lost
_READS_S = 60.0  # the same during a transfer; longer, as the fork server may be starting
_RESTART_S = 1.0  # minimum time between two starts
_NICENESS = 5  # engine steps and messages have priority


class JobEnd(Enum):
    """How a job ended."""

    DONE = "done"
    CPU_TIME = "cpu_time"
    MEMORY = "memory"
    DEPTH = "depth"  # stack overflow
    LOST = "lost"  # killed from outside, or abandoned


_SIGNALS = {
    signal.SIGPROF: JobEnd.CPU_TIME,
    signal.SIGABRT: JobEnd.MEMORY,
    signal.SIGSEGV: JobEnd.DEPTH,
    signal.SIGBUS: JobEnd.DEPTH,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended, with its grammar if it is done."""

    end: JobEnd
    grammar: Grammar | None = None
    cpu_s: float = 0.0


@dataclass(slots=True)
class Trial:
    """A submitted job."""

    job: Job
    cpu_s: float
    future: Future[Outcome] = field(default_factory=Future)
    abandoned: bool = False

    def abandon(self) -> None:
        """Cancel the job; a running one is killed soon."""
        self.abandoned = True
        self.future.cancel()


# (CPU limit, sequence number, job; None ends the thread)
_Queue = queue.PriorityQueue[tuple[float, int, Trial | None]]


def _nothing(_tokenizer: LLTokenizer) -> Grammar:
    return Grammar()


class Sandbox:
    """Owns the fork server and a thread a slot. Usable from any thread."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._lock = threading.Lock()
        self._fork_server: subprocess.Popen[bytes] | None = None
        self._sockets: list[socket.socket] = []
        self._started_s = -_RESTART_S
        self._closed = False
        self._count = itertools.count()
        self._quick: _Queue = queue.PriorityQueue()
        self._slow: _Queue = queue.PriorityQueue()
        self._queues = [self._quick] * _NUM_QUICK + [self._slow] * _NUM_SLOW  # by slot
        for slot, jobs in enumerate(self._queues):
            threading.Thread(
                target=self._serve, args=(slot, jobs), name="constraints", daemon=True
            ).start()

    def prepare(self) -> None:
        """Start the processes, so that the first job need not wait about a second for them."""
        self.submit(_nothing, 1.0)

    def submit(self, job: Job, cpu_s: float, *, slow: bool = False) -> Trial:
        """Run a picklable call with a CPU limit; its future never has an exception."""
        trial = Trial(job, cpu_s)
        (self._slow if slow else self._quick).put((cpu_s, next(self._count), trial))
        return trial

    def close(self) -> None:
        """End all processes and threads; running jobs are lost."""
        self._closed = True
        for jobs in self._queues:
            jobs.put((-1.0, next(self._count), None))
        with self._lock:
            self._end()

    def _serve(self, slot: int, jobs: _Queue) -> None:
        while (trial := jobs.get()[2]) is not None:
            if not trial.future.set_running_or_notify_cancel():
                continue
            try:
                outcome = self._outcome(slot, trial)
            except Exception as error:
                _log.error("a constraint job failed", reason=repr(error))
                outcome = Outcome(JobEnd.LOST)
            trial.future.set_result(outcome)

    def _outcome(self, slot: int, trial: Trial) -> Outcome:
        try:
            sock = self._socket(slot)
        except OSError as error:
            _log.warning("the constraint processes do not start", reason=str(error))
            return Outcome(JobEnd.LOST)
        try:
            call = pickle.dumps(trial.job)
            write_all(sock.fileno(), HEAD.pack(trial.cpu_s, len(call)) + call)
            self._wait(sock, trial)
            status, size = REPLY.unpack(read_all(sock.fileno(), REPLY.size))
            result = read_all(sock.fileno(), size)
        except (OSError, EOFError) as error:
            self._lose(sock, str(error) or "it ended")
            return Outcome(JobEnd.LOST)
        if status:
            return Outcome(_SIGNALS.get(signal.Signals(-status), JobEnd.LOST), cpu_s=trial.cpu_s)
        done = pickle.loads(result)
        assert isinstance(done, Done)
        return Outcome(JobEnd.DONE, done.grammar, done.cpu_s)

    def _wait(self, sock: socket.socket, trial: Trial) -> None:
        """Wait for the response. Raises TimeoutError if an abandoned job does not end."""
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
                raise TimeoutError("it does not respond")

    # -- the fork server ---------------------------------------------------------------------------

    def _socket(self, slot: int) -> socket.socket:
        with self._lock:
            if self._closed:
                raise OSError("closed")
            if self._fork_server is None:
                time.sleep(max(0.0, self._started_s + _RESTART_S - time.monotonic()))
                self._start()
            return self._sockets[slot]

    def _start(self) -> None:
        """Start a fork server; it dies with this thread, which lives as long as the sandbox."""
        self._started_s = time.monotonic()
        pairs = [socket.socketpair() for _ in self._queues]
        theirs = [pair[1].fileno() for pair in pairs]
        vocabulary = self._vocabulary
        command = [sys.executable, "-m", "engine.process.parent_death", f"--parent={os.getpid()}"]
        command += [f"--nice={_NICENESS}", "--env=OPENBLAS_NUM_THREADS=1", "engine.constraints"]
        command += [str(vocabulary.folder), str(vocabulary.size)]
        command += [",".join(map(str, vocabulary.eos_token_ids)), ",".join(map(str, theirs))]
        try:
            self._fork_server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=theirs
            )
            self._sockets = [pair[0] for pair in pairs]
            for sock in self._sockets:  # the fork server may hang in the middle of a transfer
                for limit in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                    sock.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", int(_READS_S), 0))
        finally:
            for pair in pairs:
                pair[1].close()

    def _lose(self, sock: socket.socket, reason: str) -> None:
        """End a broken fork server; the next job starts another one."""
        with self._lock:
            if sock in self._sockets and not self._closed:
                _log.warning("the constraint processes are lost", reason=reason)
                self._end()

    def _end(self) -> None:
        if self._fork_server is None:
            return
        self._fork_server.kill()
        self._fork_server.wait()
        self._fork_server = None
        for sock in self._sockets:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes the slot's thread
        self._sockets = []
