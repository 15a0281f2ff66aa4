"""Bounds the depth and the number of items of a client's JSON.

Depth is bounded because later code recurses. A byte of JSON becomes up to 30 bytes of Python
objects, created in one call that holds the GIL, so items are counted first, in pieces that hold the
GIL for less than a millisecond each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

MAX_DEPTH = 100
MAX_ITEMS = 262_144  # strings, names, commas, arrays and objects
MAX_CONTAINERS = 65_536  # arrays and objects
MAX_DIGITS = 512  # of a number in a large text; the largest double has 309
TOO_DEEP = f"nested deeper than {MAX_DEPTH}"
TOO_MANY = (
    f"more than {MAX_ITEMS} texts, names, commas, arrays and objects, or more than"
    f" {MAX_CONTAINERS} arrays and objects"
)
_SMALL_CHARS = 64 * 1024  # shorter texts are within the bounds, or nearly so
_PIECE_CHARS = 64 * 1024
# A piece of the content of a string.
_TEXT = re.compile(r'[^"\\]{0,65536}+(?:\\.[^"\\]{0,256}+){0,256}+', re.DOTALL)


def depth(value: Any) -> int:
    """Levels of arrays and objects; stops counting just above MAX_DEPTH."""
    levels, level = 0, [value]
    while level and levels <= MAX_DEPTH:
        levels += 1
        nested = []
        for container in level:
            items = container.values() if isinstance(container, dict) else container
            nested += [item for item in items if isinstance(item, dict | list)]
        level = nested
    return levels


def num_items(source: str) -> int:
    """Strings, names, commas, arrays and objects of a text. Raises ValueError above a bound."""
    items = containers = at = 0
    while at < len(source):
        end = min(at + _PIECE_CHARS, len(source))
        quote = source.find('"', at, end)
        stop = end if quote < 0 else quote
        opened = source.count("[", at, stop) + source.count("{", at, stop)
        containers += opened
        items += opened + source.count(",", at, stop)
        at = stop
        if quote >= 0:
            items += 1
            at = _end_of_text(source, quote + 1)
        if items > MAX_ITEMS or containers > MAX_CONTAINERS:
            raise ValueError(TOO_MANY)
    return items


class Items:
    """The budget of items that all JSON texts of one request share."""

    def __init__(self) -> None:
        self._left = MAX_ITEMS

    def take(self, source: str) -> bool:
        """Count one more text, if there is room for it; returns whether there is."""
        try:
            size = num_items(source)
        except ValueError:
            return False
        fits = size <= self._left
        self._left -= size if fits else 0
        return fits


def _end_of_text(source: str, at: int) -> int:
    """The position after the closing quote of the string that contains `at`."""
    while (piece := _TEXT.match(source, at)) is not None and piece.end() > at:
        at = piece.end()
    return at + 1


def loads(source: str, *, may_be_deep: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError if it is invalid, or beyond the bounds.

    NaN and infinities are invalid. `may_be_deep`: no later code recurses through it.
    """
    whole = fraction = None
    if len(source) > _SMALL_CHARS:
        num_items(source)
        whole, fraction = partial(_number, int), partial(_number, float)
    try:
        value = json.loads(source, parse_int=whole, parse_float=fraction, parse_constant=_refuse)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    if not may_be_deep and isinstance(value, dict | list) and depth(value) > MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    return value


def _number(kind: Callable[[str], Any], text: str) -> Any:
    """Convert a number of bounded length, because the time is quadratic in its digits."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    return kind(text)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
