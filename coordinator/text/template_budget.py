"""What one rendering of a chat template may cost. A thread cannot be ended, so the template counts.

Loops, calls and joined texts are counted, and every so often the thread's processor time is looked
at. Texts longer than any prompt are refused before they are made.
"""

from __future__ import annotations

import re
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
_OF_WIDTH = frozenset(("center", "ljust", "rjust", "zfill", "batch", "slice"))
_NUMBER = re.compile(r"\d+")
_DIGITS = 9  # of a number that is more than MAX_CHARS anyway


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
    if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, type(left)):
        count((len(left) + len(right)) * _weight(left))
    elif operator == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, str | list | tuple) and isinstance(times, int):
                count(len(value) * max(0, times) * _weight(value))
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        count(0 if left.bit_length() * right <= _MAX_BITS else MAX_CHARS + 1)
    elif operator == "%" and isinstance(left, str):
        check_call("format", left, right if isinstance(right, tuple) else (right,))


def _weight(value: Any) -> int:
    """Characters that a place takes as much memory as."""
    return 1 if isinstance(value, str) else 8


def check_call(name: str, value: Any, given: Iterable[Any]) -> None:
    """Before a filter or a method of a text makes something larger out of `value`."""
    given = list(given)
    width = sum(abs(item) for item in given if isinstance(item, int))
    texts = [item for item in given if isinstance(item, str)]
    if name in _OF_WIDTH:
        count(width)
    elif name == "round":
        check_operands("**", 10, width)
    elif name in ("indent", "expandtabs") and isinstance(value, str):
        places = value.count("\t") if name == "expandtabs" else len(value.splitlines())
        count((1 + places) * (width + sum(map(len, texts))))
    elif name == "wordwrap" and isinstance(value, str):
        count(len(value) * (1 + sum(map(len, texts))))
    elif name == "replace" and isinstance(value, str) and len(texts) > 1:
        count(value.count(texts[0]) * len(texts[1]))
    elif name in ("format", "format_map") and isinstance(value, str):
        digits = (run if len(run) < _DIGITS else "9" * _DIGITS for run in _NUMBER.findall(value))
        holds_width = "*" in value or "{" in value
        count(sum(map(int, digits)) + (width if holds_width else 0) + sum(map(len, texts)))
