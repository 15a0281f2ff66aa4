"""Threads with large stacks: a grammar compiler recurses as deep as its input is nested.

A stack of 8 MB overflows on a chain of some thousand rules. Stack memory is committed on use.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

STACK_BYTES = 128 << 20
_T = TypeVar("_T")


class BigStackThreads:
    """Runs calls, in order of arrival, off the event loop."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=name, daemon=True) for _ in range(num_threads)
        ]
        before = threading.stack_size(STACK_BYTES)
        try:
            for thread in self._threads:
                thread.start()
        finally:
            threading.stack_size(before)

    def submit(self, call: Callable[[], _T]) -> Future[_T]:
        """Run `call` on a thread; a future that is cancelled before it starts is skipped."""
        future: Future[_T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(run)
        return future

    def close(self) -> None:
        """End each thread after its current call."""
        for _ in self._threads:
            self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
