"""Shows the progress of long work: a bar on a terminal, plain lines elsewhere.

A line is printed at least every `LINE_S`, also while the work blocks, so that a log file or a CI
console shows that the process is alive, and what it does.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from operator import length_hint
from typing import Any, Self, TypeAlias

from tqdm import tqdm

LINE_S = 5.0
_QUIET_S = 0.5  # of a bar of bytes
_FIRST_LINE_S = 2.0  # of a bar: shorter work prints nothing


class Progress:
    """Lines on standard error about one piece of work. Use as a context manager.

    The first line is printed after `first_s` (0: at once). Any thread may set `detail`; each line
    shows its current value.
    """

    def __init__(self, title: str, *, first_s: float = 0.0) -> None:
        self.detail = ""
        self._title = title
        self._first_s = first_s
        self._began_s = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self._began_s

    def __enter__(self) -> Self:
        if not self._first_s:
            print_line(self._title)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        wait_s = self._first_s or LINE_S
        while not self._ended.wait(wait_s):
            detail = f"{self.detail}, " if self.detail else ""
            print_line(f"{self._title}: {detail}{self.elapsed_s:.0f} s")
            wait_s = LINE_S


class _LineBar(Progress):
    """A bar as lines: 'Packing smollm2 (auto): 34 %, 5 s'."""

    def __init__(self, iterable: Iterable[Any] | None, total: int | None, title: str) -> None:
        super().__init__(title, first_s=_FIRST_LINE_S)
        self._iterable = iterable
        self._total = total
        self._num_done = 0

    def update(self, n: int = 1) -> None:
        self._num_done += n
        if self._total:
            self.detail = f"{min(100, 100 * self._num_done // self._total)} %"

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._iterable or ():
                yield item
                self.update()


Bar: TypeAlias = "tqdm[Any] | _LineBar"  # of which `update`, iteration and the context are used


def bar(
    iterable: Iterable[Any] | None = None,
    *,
    desc: str,
    total: int | None = None,
    show: bool = True,
    **options: Any,
) -> Bar:
    """A bar with tqdm's options, for iteration or updates; `show=False` shows nothing."""
    if not show or sys.stderr.isatty():
        return tqdm(iterable, desc=desc, total=total, disable=not show, **options)
    if total is None:
        total = length_hint(iterable) or None
    return _LineBar(iterable, total, desc)


def byte_bar(desc: str, total: int) -> Bar:
    """A bar of bytes; quick work shows nothing."""
    return bar(desc=desc, total=total, unit="B", unit_scale=True, delay=_QUIET_S)


def print_line(text: str) -> None:
    """Print one line on standard error; a closed stderr does not stop the work."""
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        pass
