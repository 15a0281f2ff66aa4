"""The processes that compile constraints under limits: `python -m engine.constraints`.

    parent ==sockets==> fork server   holds the tokenizer; one thread; parses no client data
                          | forks one runner a slot, before a job arrives
                        runner        one job at a time; limits of memory, CPU time and stack

The kernel kills a runner that reaches a limit, and the signal tells the parent which limit it was.
The parent can also have a runner killed. The next runner is forked in some milliseconds, and shares
the tokenizer's memory. All of these processes end with the parent.

    slot       a Unix socket; one job at a time: HEAD and a pickled call, or KILL
    response   one a job: REPLY with status 0 and a pickled Done, or with minus the signal number
"""

from __future__ import annotations

import gc
import os
import pickle
import resource
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from llguidance import LLMatcher, LLTokenizer

from engine.constraints.grammar import LIMITS, Grammar, Vocabulary, compile_error, no_tokenizer
from engine.process.parent_death import die_with_parent

HEAD = struct.Struct("!dI")  # CPU seconds, bytes of the call
REPLY = struct.Struct("!iI")  # status, bytes of the result
KILL = HEAD.pack(-1.0, 0)
MAX_BYTES = 256 << 20  # beyond the address space of a new runner
STACK_BYTES = 64 << 20
QUICK_CPU_S = 0.25  # jobs with a larger limit have a lower priority
_SLOW_NICENESS = 10  # added to the fork server's
# A runner ends, which frees its memory, after a job that used more than this.
_FRESH_CPU_S, _FRESH_BYTES = 0.1, 32 << 20
_PAUSE_S = 0.2  # after a runner that ended without a job

Job = Callable[[LLTokenizer], Grammar]


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a job that ended within its limits."""

    grammar: Grammar
    cpu_s: float
    is_last: bool  # the runner ends after it


class _Slot:
    """One socket and its runner; lives in the fork server."""

    def __init__(self, parent: socket.socket, work: Callable[[], NoReturn]) -> None:
        self.parent = parent
        self._work = work
        self._busy = False
        self._pid = self._jobs = self.results = -1

    def fork(self) -> None:
        """Start a runner, with its jobs as standard input and its results as standard output."""
        read_jobs, self._jobs = os.pipe()
        self.results, write_results = os.pipe()
        fork_server = os.getpid()
        self._pid = os.fork()
        if not self._pid:
            try:
                die_with_parent(fork_server)
                for fd, target in ((read_jobs, 0), (write_results, 1), (os.open(os.devnull, 1), 2)):
                    os.dup2(fd, target)
                os.closerange(3, max(read_jobs, write_results, self.parent.fileno()) + 64)
                self._work()
            finally:
                os._exit(1)
        os.close(read_jobs)
        os.close(write_results)

    def from_parent(self) -> None:
        """Forward a job to the runner, or kill it. Raises EOFError if the parent has ended."""
        head = read_all(self.parent.fileno(), HEAD.size)
        if head == KILL:
            if self._busy:  # else the response is already on its way
                os.kill(self._pid, signal.SIGKILL)
            return
        call = read_all(self.parent.fileno(), HEAD.unpack(head)[1])
        self._busy = True
        with suppress(BrokenPipeError):  # then the exit status is the response
            write_all(self._jobs, head + call)

    def from_runner(self) -> bool:
        """Forward a result; True: the runner ended and was replaced."""
        try:
            reply = read_all(self.results, REPLY.size)
            result = read_all(self.results, REPLY.unpack(reply)[1])
            is_last = bool(pickle.loads(result).is_last)
        except EOFError:
            status = os.waitpid(self._pid, 0)[1]
            code = os.waitstatus_to_exitcode(status)
            reply, result, is_last = REPLY.pack(min(code, -1), 0), b"", True
            self._pid = 0
            if not self._busy:  # it may have failed to start: no memory, no threads
                time.sleep(_PAUSE_S)
        if self._busy:
            self._busy = False
            write_all(self.parent.fileno(), reply + result)
        if is_last:
            if self._pid:
                os.waitpid(self._pid, 0)
            os.close(self._jobs)
            os.close(self.results)
            self.fork()
        return is_last


def read_all(fd: int, size: int) -> bytes:
    """Read exactly `size` bytes. Raises EOFError."""
    parts = []
    while size:
        if not (part := os.read(fd, size)):
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`; blocks while the buffer is full."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


# -- in a runner -----------------------------------------------------------------------------------


def _run(tokenizer: LLTokenizer | None, reason: str) -> NoReturn:
    """Run jobs, on a thread of known stack size, until the runner has to end."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # killed before its parents
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_jobs, args=(tokenizer, reason), daemon=True)
    thread.start()
    thread.join()
    os._exit(0)


def _jobs(tokenizer: LLTokenizer | None, reason: str) -> None:
    begin_bytes = _num_bytes()
    if begin_bytes:
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = begin_bytes + MAX_BYTES
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with suppress(EOFError):
        while True:
            cpu_s, size = HEAD.unpack(read_all(0, HEAD.size))
            call = read_all(0, size)
            if cpu_s > QUICK_CPU_S:
                os.nice(_SLOW_NICENESS)
            begun_s = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, cpu_s)  # unhandled SIGPROF ends the process
            try:
                job: Job = pickle.loads(call)
                grammar = job(tokenizer) if tokenizer else Grammar(reason=reason)
            except MemoryError:
                os.abort()  # as llguidance does
            except BaseException as error:  # Rust panics are no Exceptions
                grammar = Grammar(reason=f"cannot be compiled: {type(error).__name__}")
            used_s = time.process_time() - begun_s
            is_last = cpu_s > QUICK_CPU_S or used_s > _FRESH_CPU_S
            is_last = is_last or _num_bytes() > begin_bytes + _FRESH_BYTES
            result = pickle.dumps(Done(grammar, used_s, is_last))
            signal.setitimer(signal.ITIMER_PROF, 0)
            write_all(1, REPLY.pack(0, len(result)) + result)
            if is_last:
                return


def _num_bytes() -> int:
    """The size of the address space; 0 where it is unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


# -- in the fork server ----------------------------------------------------------------------------


def main() -> None:
    """Run the fork server. Arguments: tokenizer folder, vocabulary size, EOS ids, socket fds."""
    folder, size, eos_ids, sockets = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM):  # the parent may still have requests then
        signal.signal(number, signal.SIG_IGN)
    eos = tuple(int(token) for token in eos_ids.split(",") if token)
    tokenizer, reason = None, ""
    try:
        tokenizer = Vocabulary(Path(folder), int(size), eos).build()
        warm = LLMatcher.grammar_from_json_schema('{"type": "object"}')
        compile_error(LLMatcher(tokenizer, warm, log_level=0, limits=LIMITS))
    except Exception as error:  # llguidance raises many kinds
        reason = no_tokenizer(error)
    gc.collect()
    gc.freeze()
    slots = [
        _Slot(socket.socket(fileno=int(fd)), lambda: _run(tokenizer, reason))
        for fd in sockets.split(",")
    ]
    with selectors.DefaultSelector() as selector:
        for slot in slots:
            slot.fork()
            selector.register(slot.parent, selectors.EVENT_READ, slot)
            selector.register(slot.results, selectors.EVENT_READ, slot)
        while True:
            for key, _ in selector.select():
                slot = key.data
                if key.fileobj is slot.parent:
                    try:
                        slot.from_parent()
                    except (EOFError, OSError):
                        return
                else:
                    selector.unregister(slot.results)
                    slot.from_runner()
                    selector.register(slot.results, selectors.EVENT_READ, slot)
