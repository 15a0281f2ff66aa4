"""What one rendering of a chat template may cost. A thread cannot be ended, so the template counts.

Loops, calls and joined texts are counted, and every so often the thread's processor time is looked
at. Texts longer than any prompt are refused before they are made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

RENDER_S = 2.0  # of processor time
MAX_CHARS = 1 << 26  # of any text: four times as many as a request has bytes
_CHARS_A_COUNT = 1024
_COUNTS_A_LOOK = 64
_MAX_BITS = 1 << 16  # of a power


class TooCostly(Exception):
    """The rendering is not to go on."""


class _Budget(threading.local):
    end_s: float | None = None  # None: nothing is rendered in this thread
    left: int = _COUNTS_A_LOOK


_budget = _Budget()


@contextmanager
def rendering() -> Iterator[None]:
    """Inside, this thread's templates raise TooCostly after RENDER_S."""
    _budget.end_s, _budget.left = time.thread_time() + RENDER_S, _COUNTS_A_LOOK
    try:
        yield
    finally:
        _budget.end_s = None


def count(num_chars: int = 0) -> None:
    """Something was done, with so many characters. Raises TooCostly."""
    if num_chars > MAX_CHARS:
        raise TooCostly(f"it makes a text of more than {MAX_CHARS} characters")
    _budget.left -= 1 + num_chars // _CHARS_A_COUNT
    if _budget.left < 0:
        _budget.left = _COUNTS_A_LOOK
        if _budget.end_s is not None and time.thread_time() > _budget.end_s:
            raise TooCostly(f"it takes more than {RENDER_S:g} s of processor time")


def counted(values: Iterable[Any]) -> Iterator[Any]:
    """The same values; each is a turn of a loop."""
    for value in values:
        count()
        yield value


def counted_parts(parts: Iterable[str]) -> list[str]:
    """Parts of one text, of which there are not too many."""
    kept, num_chars = [], 0
    for part in parts:
        num_chars += len(part)
        count(num_chars if num_chars > MAX_CHARS else len(part))
        kept.append(part)
    return kept


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Before `left operator right` is computed."""
    if operator == "+" and isinstance(left, str) and isinstance(right, str):
        count(len(left) + len(right))
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(times, int):
                count(len(value) * max(0, times))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        count(0 if left.bit_length() * right <= _MAX_BITS else MAX_CHARS + 1)
