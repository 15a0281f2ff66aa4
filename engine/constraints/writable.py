"""What answers can write of a schema's constants, patterns and names: characters and numbers.

A string has the escapes of ESCAPES, with "u" also those of control characters. A surrogate by
itself is no character; the library could not even read it. Numbers are doubles.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NoReturn

from engine.constraints.ways import Refused, Ways

EXACT = 1 << 53  # integers up to here are doubles, and so are their neighbours
_LARGEST = 1 << 63  # of constants
_POWERS_OF_TEN = 22  # that are doubles
SURROGATE = re.compile("[\ud800-\udfff]")  # one by itself is no character
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
# Control characters that JSON writes with \u alone; in a pattern also by their escapes.
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_ANY_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CONTROL_ESCAPE = re.compile(r"\\(x([01]|7[fF]|\{)|u(00[01]|007[fF]|\{)|c[A-Za-z]|[0vae])")
MAY_NEED_ESCAPES = re.compile(r"\\u00[01]|\\u007[fF]|\x7f|\\\\[xuc0vae]")  # in JSON
# One pass: a class that is not closed reaches to the end, where the library refuses it.
_CLASS = re.compile(r"(?<!\\)\[((?:\\.|[^\]\\])*+)(?:\]|\\?\Z)", re.S)
_RANGE = re.compile(r"[^\]\\]-")
_NAMING = ("properties", "patternProperties", "required")


def read_json(source: str, lenient: bool) -> tuple[object, bool]:
    """The value of a JSON text, and whether surrogates or numbers without an end may be in it."""
    is_odd = _SURROGATE_ESCAPE.search(source) is not None
    is_odd = is_odd or (not source.isascii() and SURROGATE.search(source) is not None)

    def number(text: str) -> float:
        nonlocal is_odd
        value = float(text)
        is_odd = is_odd or not math.isfinite(value)
        return value

    constant = number if lenient else _no_constant
    return json.loads(source, parse_float=number, parse_constant=constant), is_odd


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def plain(value: Any) -> Any:
    """The same without what the library could not read."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {plain(name): plain(each) for name, each in value.items()}
    return value


def check_constant(key: str, value: object, ways: Ways) -> None:
    """Raise Refused where a value cannot be written exactly."""
    dumped = json.dumps(value, ensure_ascii=False) if ways.may_be_odd else ""
    if found := SURROGATE.search(dumped):
        raise cannot_be_written(key, found[0])
    for part in _scalars(value):
        if isinstance(part, str) and "u" not in ways.escapes and (found := _CONTROL.search(part)):
            raise cannot_be_written(key, found[0])
        if isinstance(part, int | float) and not _fits(part):
            raise Refused(f"{key}: {part} has too many digits")


def cannot_be_written(key: str, character: str) -> Refused:
    """The reason that names a character."""
    return Refused(f"{key}: character U+{ord(character):04X} cannot be written")


def _fits(number: int | float) -> bool:
    if isinstance(number, float):
        return is_read_well(number)
    return abs(number) < _LARGEST and int(float(number)) == number


def is_read_well(number: float) -> bool:
    """The library reads decimals of more digits one off in the last place."""
    if not math.isfinite(number):
        return False
    _, digits, exponent = Decimal(repr(number)).as_tuple()
    return int("".join(map(str, digits))) < EXACT and abs(int(exponent)) <= _POWERS_OF_TEN


def _scalars(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _scalars(each)
    else:
        yield value


def check_pattern(key: str, pattern: str, ways: Ways | None) -> None:
    """`ways`: how its strings may be written; None: as names, which have no control characters."""
    if found := SURROGATE.search(pattern):
        raise cannot_be_written(key, found[0])
    if (ways is None or "u" not in ways.escapes) and (found := _control_in(pattern)):
        raise Refused(f"{key}: control character {found[0]!a} cannot be written")


def _control_in(pattern: str) -> re.Match[str] | None:
    rest = _CLASS.sub(_narrow, pattern.replace("\\\\", ""))
    return _CONTROL.search(rest) or _CONTROL_ESCAPE.search(rest)


def _narrow(found: re.Match[str]) -> str:
    """A class, unless it has a range or excludes something: then it has other characters too."""
    return "" if found[1].startswith("^") or _RANGE.search(found[1]) else found[0]


def names_vary(value: object) -> bool:
    """Whether \\u could write one of its names in another way: one with a control character, or any
    where free names may come beside those that are given.
    """
    if isinstance(value, dict):
        if any(_ANY_CONTROL.search(name) for name in value):
            return True
        if value.get("additionalProperties") is not False and any(map(value.get, _NAMING)):
            return True
        required = value.get("required")
        if isinstance(required, list) and any(_ANY_CONTROL.search(str(n)) for n in required):
            return True
        value = list(value.values())
    return isinstance(value, list) and any(map(names_vary, value))


def needs_unicode_escapes(value: object) -> bool:
    """Whether a constant or a pattern in it has a character that only \\u can write."""
    if isinstance(value, list):
        return any(map(needs_unicode_escapes, value))
    if not isinstance(value, dict):
        return False
    for key, each in value.items():
        if key in ("const", "enum"):
            if any(isinstance(part, str) and _CONTROL.search(part) for part in _scalars(each)):
                return True
        elif key == "pattern" and isinstance(each, str):
            if _control_in(each):
                return True
        elif needs_unicode_escapes(each):
            return True
    return False
