"""Token masks of a step, computed on threads beside the engine thread.

    begin(requests) -> batch       split over the threads; each request gives 1 + len(draft) rows
    wait(batch, timeout) -> rows   late masks arrive in a later step

A mask thread owns a matcher while it is `busy`. A thread that spends SLOW_S of CPU time (or STUCK_S
by the clock) on one mask is abandoned and replaced. From then on all copies of that grammar go to
the slow thread, which has a low priority and is never waited for, until several of their masks in
a row are cheap. Copies of a grammar share a lexer cache and its lock, so no copy is used while
another one is late.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from llguidance import LLExecutor

from engine.constraints.matcher import Matcher, Rows
from engine.process.core_share import usable_cores

_WAIT_S = 30.0
_MAX_THREADS = 8
_MAX_ABANDONED = 8  # at once; beyond that, late threads are not replaced
_NICENESS = 10  # of threads that nothing waits for
SLOW_S = 0.005
STUCK_S = 0.1  # by the clock: a lock, or a draft, whose masks llguidance's threads compute


@dataclass(frozen=True, slots=True)
class MaskRequest:
    """An output whose next masks are needed, and the draft to verify."""

    matcher: Matcher
    draft: Sequence[int]  # fits the grammar: see Matcher.num_valid


@dataclass(slots=True)
class _Task:
    """One request of a batch."""

    key: int
    request: MaskRequest
    rows: Rows | None = None  # when it is done
    is_late: bool = False  # nothing waits for it any more


@dataclass(slots=True)
class _Job:
    """The share of a batch that one thread computes."""

    thread: _MaskThread
    tasks: list[_Task]
    num_begun: int = 0
    begun_s: float = 0.0  # when the newest of those began
    begun_cpu_s: float = 0.0  # CPU time of the thread at that moment
    is_cut: bool = False  # no further task begins
    done: threading.Event = field(default_factory=threading.Event)


Batch = list[_Job]  # masks that are being computed


class Masks:
    """Owned by the engine thread."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._lock = threading.Lock()  # of jobs and their tasks
        self._num_abandoned = 0  # threads that were replaced and still compute
        count = min(_MAX_THREADS, max(1, usable_cores() // 2))
        self._threads = [_MaskThread(self._run, "masks") for _ in range(count)]
        self._slow: _MaskThread | None = None
        self._late_arrived = threading.Event()  # set by a late mask, cleared by `wait_for_late`

    def begin(self, requests: Mapping[int, MaskRequest]) -> Batch:
        """Start to compute the masks of these requests; results have the same keys."""
        quick: list[_Task] = []
        for key, request in requests.items():
            if request.matcher.shared.is_slow:
                self._submit_slow(_Task(key, request))
            else:
                quick.append(_Task(key, request))
        threads = [thread for thread in self._threads if thread.late is None]
        jobs: Batch = []
        while quick and threads:
            thread, share = threads.pop(), -(-len(quick) // (len(threads) + 1))
            jobs.append(_Job(thread, quick[:share]))
            quick = quick[share:]
            for task in jobs[-1].tasks:
                task.request.matcher.busy = True
            thread.jobs.put(jobs[-1])
        return jobs

    def wait(self, batch: Batch, at_most_s: float = _WAIT_S) -> dict[int, Rows]:
        """Masks by key, [1 + len(draft), words] each, of those done in time. Others stay busy."""
        end_s = time.monotonic() + at_most_s
        rows: dict[int, Rows] = {}
        for job in batch:
            if not job.done.wait(max(0.0, end_s - time.monotonic())):
                self._mark_late(job)
            rows |= {task.key: task.rows for task in job.tasks if task.rows is not None}
        return rows

    def wait_for_late(self, at_most_s: float) -> None:
        """Block until a late mask arrives, for a step that has nothing else to do."""
        self._late_arrived.wait(at_most_s)
        self._late_arrived.clear()

    def _submit_slow(self, task: _Task) -> None:
        if self._slow is None:
            self._slow = _MaskThread(self._run, "slow masks", _NICENESS)
        task.request.matcher.busy = True
        job = _Job(self._slow, [task])
        self._mark_late(job)
        self._slow.jobs.put(job)

    def _mark_late(self, job: _Job) -> None:
        with self._lock:
            late = [task for task in job.tasks if task.rows is None]
            for task in late:
                task.is_late = True
                task.request.matcher.shared.num_late += 1
            job.thread.late = job if late else None

    def replace_slow_threads(self) -> None:
        """Abandon and replace the threads that are late and slow; called once a step."""
        for i, thread in enumerate(self._threads):
            job = thread.late
            if job is None or self._num_abandoned >= _MAX_ABANDONED:
                continue
            with self._lock:
                if job.done.is_set() or not job.num_begun:
                    continue
                cpu_s, clock_s = thread.cpu_s() - job.begun_cpu_s, time.monotonic() - job.begun_s
                if cpu_s < SLOW_S and clock_s < STUCK_S:
                    continue
                job.is_cut = True
                job.tasks[job.num_begun - 1].request.matcher.shared.slow_down()
                for task in job.tasks[job.num_begun :]:
                    task.request.matcher.busy = False
                    task.request.matcher.shared.num_late -= 1
                self._num_abandoned += 1
                thread.is_abandoned = True
            thread.abandon()
            self._threads[i] = _MaskThread(self._run, "masks")

    # -- on the mask threads -----------------------------------------------------------------------

    def _run(self, job: _Job) -> None:
        for task in job.tasks:
            with self._lock:
                if job.is_cut:
                    break
                job.num_begun += 1
                job.begun_s, job.begun_cpu_s = time.monotonic(), time.thread_time()
            request, executor = task.request, job.thread.executor
            rows = request.matcher.compute_masks(self._num_words, request.draft, executor)
            with self._lock:
                task.rows = rows
                request.matcher.busy = False
                if task.is_late:
                    request.matcher.shared.num_late -= 1
                    self._late_arrived.set()
        with self._lock:
            job.thread.late = None
            self._num_abandoned -= job.thread.is_abandoned
            job.done.set()


class _MaskThread:
    """A thread that runs jobs in order. It ends with the process, or after `abandon`."""

    def __init__(self, run: Callable[[_Job], None], name: str, niceness: int = 0) -> None:
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self.executor: LLExecutor  # created on the thread
        self.late: _Job | None = None
        self.is_abandoned = False
        self._run, self._niceness = run, niceness
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def abandon(self) -> None:
        """End after the current job, which continues at a low priority."""
        self.jobs.put(None)
        _lower(self._thread.native_id, _NICENESS)

    def cpu_s(self) -> float:
        """CPU time of the thread, which must not have ended."""
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident or 0))

    def _main(self) -> None:
        _lower(threading.get_native_id(), self._niceness)
        self.executor = LLExecutor(1)
        while (job := self.jobs.get()) is not None:
            self._run(job)


def _lower(thread_id: int | None, niceness: int) -> None:
    """Lower a thread's priority. Linux only: elsewhere these ids are those of processes."""
    if sys.platform == "linux" and thread_id is not None and niceness:
        try:
            os.setpriority(os.PRIO_PROCESS, thread_id, niceness)
        except OSError:  # the thread has ended
            pass
