"""Masks of a step: which tokens each position may give, computed beside the engine thread.

    begin(places) -> lanes, a thread each -> of each place 1 + len(draft) rows of bits
         |                                      |
         '--- wait(batch, at most so long) -----'     what is late is left to its lane

A matcher belongs to a lane while it is `busy`; what is late comes in a later step. A lane in which
one mask takes SLOW_S of processor time (or STUCK_S) is left alone with it, and replaced by another.
From then on all copies of that grammar go to the slow lane, which has a low priority and is not
waited for, until several of their masks in a row are cheap again. Copies share what they have
learned, and a lock: none is touched while another one is late.
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
_MOST_LANES = 8
_MOST_LEFT = 8  # lanes that are left alone at once; with more, places wait for them
_NICENESS = 10  # of a thread that holds nothing up
SLOW_S = 0.005
STUCK_S = 0.1  # by the clock: a lock, or a draft, whose masks are computed on the library's threads


@dataclass(frozen=True, slots=True)
class Place:
    """An answer that is to go on, and the guess that it is to be verified with."""

    matcher: Matcher
    draft: Sequence[int]  # it could come: see Matcher.num_valid


@dataclass(slots=True)
class _Task:
    """One place of a batch, in a lane."""

    key: int
    place: Place
    rows: Rows | None = None  # when it is done
    is_late: bool = False  # no longer waited for


@dataclass(slots=True)
class _Job:
    """What a lane does in one go."""

    lane: _Lane
    tasks: list[_Task]
    num_begun: int = 0
    begun_s: float = 0.0  # when it began the last of those
    begun_cpu_s: float = 0.0  # processor time of the lane at that moment
    is_cut: bool = False  # no other task is to be begun
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class Batch:
    """Masks under way."""

    jobs: list[_Job]


class Masks:
    """Owned by the engine thread."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._lock = threading.Lock()  # of jobs and their tasks
        self._num_left = 0  # lanes that were given up and still compute
        count = min(_MOST_LANES, max(1, usable_cores() // 2))
        self._lanes = [_Lane(self._run, "masks") for _ in range(count)]
        self._slow: _Lane | None = None
        self._came = threading.Event()  # a late mask, since the last `wait_for_late`

    def begin(self, places: Mapping[int, Place]) -> Batch:
        """Compute the masks of these places, by the keys that they have here."""
        quick: list[_Task] = []
        for key, place in places.items():
            if place.matcher.kin.is_slow:
                self._leave(_Task(key, place))
            else:
                quick.append(_Task(key, place))
        lanes = [lane for lane in self._lanes if lane.late is None]
        jobs: list[_Job] = []
        while quick and lanes:
            lane, share = lanes.pop(), -(-len(quick) // (len(lanes) + 1))
            jobs.append(_Job(lane, quick[:share]))
            quick = quick[share:]
            for task in jobs[-1].tasks:
                task.place.matcher.busy = True
            lane.jobs.put(jobs[-1])
        return Batch(jobs)

    def wait(self, batch: Batch, at_most_s: float = _WAIT_S) -> dict[int, Rows]:
        """The masks that are there in time; the other matchers stay busy, or were not begun."""
        end_s = time.monotonic() + at_most_s
        rows: dict[int, Rows] = {}
        for job in batch.jobs:
            if not job.done.wait(max(0.0, end_s - time.monotonic())):
                self._leave_late(job)
            rows |= {task.key: task.rows for task in job.tasks if task.rows is not None}
        return rows

    def wait_for_late(self, at_most_s: float) -> None:
        """Until another late mask is there: for a step that has nothing else to do."""
        self._came.wait(at_most_s)
        self._came.clear()

    def _leave(self, task: _Task) -> None:
        """Have it computed, and do not wait."""
        if self._slow is None:
            self._slow = _Lane(self._run, "slow masks", _NICENESS)
        task.place.matcher.busy = True
        job = _Job(self._slow, [task])
        self._leave_late(job)
        self._slow.jobs.put(job)

    def _leave_late(self, job: _Job) -> None:
        with self._lock:
            late = [task for task in job.tasks if task.rows is None]
            for task in late:
                task.is_late = True
                task.place.matcher.kin.num_late += 1
            job.lane.late = job if late else None

    def review(self) -> None:
        """Replace the lanes that are late and slow; once a step."""
        for i, lane in enumerate(self._lanes):
            job = lane.late
            if job is None or self._num_left >= _MOST_LEFT:
                continue
            with self._lock:
                if job.done.is_set() or not job.num_begun:
                    continue
                cpu_s, clock_s = lane.cpu_s() - job.begun_cpu_s, time.monotonic() - job.begun_s
                if cpu_s < SLOW_S and clock_s < STUCK_S:
                    continue
                job.is_cut = True
                job.tasks[job.num_begun - 1].place.matcher.kin.slow_down()
                for task in job.tasks[job.num_begun :]:
                    task.place.matcher.busy = False
                    task.place.matcher.kin.num_late -= 1
                self._num_left += 1
                lane.is_left = True
            lane.leave()
            self._lanes[i] = _Lane(self._run, "masks")

    # -- in the lanes ------------------------------------------------------------------------------

    def _run(self, job: _Job) -> None:
        for task in job.tasks:
            with self._lock:
                if job.is_cut:
                    break
                job.num_begun += 1
                job.begun_s, job.begun_cpu_s = time.monotonic(), time.thread_time()
            place, executor = task.place, job.lane.executor
            rows = place.matcher.look(self._num_words, place.draft, executor)
            with self._lock:
                task.rows = rows
                place.matcher.busy = False
                if task.is_late:
                    place.matcher.kin.num_late -= 1
                    self._came.set()
        with self._lock:
            job.lane.late = None
            self._num_left -= job.lane.is_left
            job.done.set()


class _Lane:
    """A thread that does jobs one after the other. It ends with the process, or when it is left."""

    def __init__(self, run: Callable[[_Job], None], name: str, niceness: int = 0) -> None:
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self.executor: LLExecutor  # the thread's
        self.late: _Job | None = None  # what it is late with
        self.is_left = False
        self._run, self._niceness = run, niceness
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """End after the job in progress, which goes on at a low priority."""
        self.jobs.put(None)
        _lower(self._thread.native_id, _NICENESS)

    def cpu_s(self) -> float:
        """Processor time of the thread, which has not ended."""
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident or 0))

    def _main(self) -> None:
        _lower(threading.get_native_id(), self._niceness)
        self.executor = LLExecutor(1)
        while (job := self.jobs.get()) is not None:
            self._run(job)


def _lower(thread_id: int | None, niceness: int) -> None:
    """Let the other threads go first. Elsewhere than on Linux these ids are processes'."""
    if sys.platform == "linux" and thread_id is not None and niceness:
        try:
            os.setpriority(os.PRIO_PROCESS, thread_id, niceness)
        except OSError:  # the thread has ended
            pass
