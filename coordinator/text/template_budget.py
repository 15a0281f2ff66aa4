"""Bounds the cost of rendering a chat template. A thread cannot be killed, so the template counts.

Loop iterations, calls and joined texts are counted, and the thread's CPU time is checked at
intervals. Texts longer than any prompt are refused before they are created.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

RENDER_S = 2.0  # CPU time
MAX_CHARS = 1 << 26  # of any text: four times the maximum bytes of a request
_CHARS_A_COUNT = 1024
_COUNTS_A_CHECK = 64
_MAX_BITS = 1 << 16  # of a power
_WITH_WIDTH = frozenset(("center", "ljust", "rjust", "zfill", "batch", "slice"))
_NUMBER = re.compile(r"\d+")
_DIGITS = 9  # numbers of so many digits exceed MAX_CHARS


class TooCostly(Exception):
    """The rendering exceeds its bounds."""


class _Budget(threading.local):
    end_s: float | None = None  # None: this thread does not render
    left: int = _COUNTS_A_CHECK


_budget = _Budget()


@contextmanager
def rendering() -> Iterator[None]:
    """Within this context, templates on this thread raise TooCostly after RENDER_S."""
    _budget.end_s, _budget.left = time.thread_time() + RENDER_S, _COUNTS_A_CHECK
    try:
        yield
    finally:
        _budget.end_s = None


def count(num_chars: int = 0) -> None:
    """Count one operation with a text of `num_chars`. Raises TooCostly."""
    if num_chars > MAX_CHARS:
        raise TooCostly(f"it makes a text of more than {MAX_CHARS} characters")
    _budget.left -= 1 + num_chars // _CHARS_A_COUNT
    if _budget.left < 0:
        _budget.left = _COUNTS_A_CHECK
        if _budget.end_s is not None and time.thread_time() > _budget.end_s:
            raise TooCostly(f"it takes more than {RENDER_S:g} s of processor time")


def counted(values: Iterable[Any]) -> Iterator[Any]:
    """Iterate over `values`, and count each."""
    for value in values:
        count()
        yield value


def counted_parts(parts: Iterable[str]) -> list[str]:
    """The parts of one text, counted."""
    kept, num_chars = [], 0
    for part in parts:
        num_chars += len(part)
        count(num_chars if num_chars > MAX_CHARS else len(part))
        kept.append(part)
    return kept


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Check the size of `left operator right` before it is computed. Raises TooCostly."""
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
    """Memory of an element, in characters."""
    return 1 if isinstance(value, str) else 8


def check_call(name: str, value: Any, args: Iterable[Any]) -> None:
    """Check the size of a filter's or method's result before the call. Raises TooCostly."""
    args = list(args)
    width = sum(abs(item) for item in args if isinstance(item, int))
    texts = [item for item in args if isinstance(item, str)]
    if name in _WITH_WIDTH:
        count(width)
    elif name == "round":
        check_operands("**", 10, width)
    elif name in ("indent", "expandtabs") and isinstance(value, str):
        num_inserted = value.count("\t") if name == "expandtabs" else len(value.splitlines())
        count((1 + num_inserted) * (width + sum(map(len, texts))))
    elif name == "wordwrap" and isinstance(value, str):
        count(len(value) * (1 + sum(map(len, texts))))
    elif name == "replace" and isinstance(value, str) and len(texts) > 1:
        count(value.count(texts[0]) * len(texts[1]))
    elif name in ("format", "format_map") and isinstance(value, str):
        digits = (run if len(run) < _DIGITS else "9" * _DIGITS for run in _NUMBER.findall(value))
        holds_width = "*" in value or "{" in value
        count(sum(map(int, digits)) + (width if holds_width else 0) + sum(map(len, texts)))
