"""How much JSON of a caller may be: how deep, for what walks through it later recurses, and how
much in number.

A byte of JSON becomes up to 30 of Python's objects, made in one go with the GIL held. So a text is
counted first, by pieces that hold the GIL for less than a millisecond each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

MAX_DEPTH = 100
MAX_ITEMS = 262_144  # texts, names, commas, arrays and objects
MAX_CONTAINERS = 65_536  # arrays and objects
MAX_DIGITS = 512  # of a number in a large text; the largest double has 309
TOO_DEEP = f"nested deeper than {MAX_DEPTH}"
TOO_MANY = (
    f"more than {MAX_ITEMS} texts, names, commas, arrays and objects, or more than"
    f" {MAX_CONTAINERS} arrays and objects"
)
_SMALL_CHARS = 64 * 1024  # a text of this size is within the bounds, or nearly so
_PIECE_CHARS = 64 * 1024
_TEXT = re.compile(r'[^"\\]{0,65536}+(?:\\.[^"\\]{0,256}+){0,256}+', re.DOTALL)  # a piece of one


def depth(value: Any) -> int:
    """Levels of arrays and objects; stops counting just above the bound."""
    levels, level = 0, [value]
    while level and levels <= MAX_DEPTH:
        levels += 1
        below = []
        for container in level:
            items = container.values() if isinstance(container, dict) else container
            below += [item for item in items if isinstance(item, dict | list)]
        level = below
    return levels


def num_items(source: str) -> int:
    """Texts, names, commas, arrays and objects in a JSON text; counts until just above a bound.

    Raises ValueError there.
    """
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
    """What several JSON texts of one request may have in sum."""

    def __init__(self) -> None:
        self._left = MAX_ITEMS

    def take(self, source: str) -> bool:
        """Whether there is room for one more text, which is counted then."""
        try:
            size = num_items(source)
        except ValueError:
            return False
        fits = size <= self._left
        self._left -= size if fits else 0
        return fits


def _end_of_text(source: str, at: int) -> int:
    """The position behind the quote that ends the text which goes on at `at`."""
    while (piece := _TEXT.match(source, at)) is not None and piece.end() > at:
        at = piece.end()
    return at + 1


def loads(source: str, *, may_be_deep: bool = False) -> Any:
    """The value of a JSON text. Raises ValueError where it is none, or beyond the bounds.

    NaN and infinities are no JSON. `may_be_deep`: nothing walks through it.
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
    """Time goes with the square of the digits."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of more than {MAX_DIGITS} digits")
    return kind(text)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
