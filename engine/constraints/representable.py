"""Checks whether an output can contain a schema's constants, patterns and names exactly.

Strings may use the escapes of `SchemaContext.escapes`; control characters need "u" among them. A
lone surrogate is no character, and llguidance cannot read it. Numbers are doubles.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any, NoReturn

from engine.constraints.json_walk import objects_in
from engine.constraints.schema_context import SchemaContext, UnsupportedSchema

EXACT = 1 << 53  # all integers up to here are doubles
_LARGEST = 1 << 63  # constants lie below this
_POWERS_OF_TEN = 22  # largest exact power of ten among doubles
SURROGATE = re.compile("[\ud800-\udfff]")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
# Control characters without a short JSON escape; in patterns also as their escapes.
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_ANY_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CONTROL_ESCAPE = re.compile(r"\\(x([01]|7[fF]|\{)|u(00[01]|007[fF]|\{)|c[A-Za-z]|[0vae])")
MAY_NEED_ESCAPES = re.compile(r"\\u00[01]|\\u007[fF]|\x7f|\\\\[xuc0vae]")  # in JSON
# An unclosed class matches to the end in one pass, and llguidance refuses it.
_CLASS = re.compile(r"(?<!\\)\[((?:\\.|[^\]\\])*+)(?:\]|\\?\Z)", re.S)
_RANGE = re.compile(r"[^\]\\]-")
_NAMING = ("properties", "patternProperties", "required")


def read_json(source: str, lenient: bool) -> tuple[object, bool]:
    """The value of a JSON text, and whether it may contain surrogates or infinite numbers."""
    may_be_unwritable = _SURROGATE_ESCAPE.search(source) is not None
    may_be_unwritable = may_be_unwritable or (
        not source.isascii() and SURROGATE.search(source) is not None
    )

    def number(text: str) -> float:
        nonlocal may_be_unwritable
        value = float(text)
        may_be_unwritable = may_be_unwritable or not math.isfinite(value)
        return value

    constant = number if lenient else _no_constant
    return json.loads(source, parse_float=number, parse_constant=constant), may_be_unwritable


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def sanitized(value: Any) -> Any:
    """The value with what llguidance cannot read replaced."""
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [sanitized(each) for each in value]
    if isinstance(value, dict):
        return {sanitized(name): sanitized(each) for name, each in value.items()}
    return value


def check_constant(key: str, value: object, context: SchemaContext) -> None:
    """Raise UnsupportedSchema if an output cannot contain `value` exactly."""
    dumped = json.dumps(value, ensure_ascii=False) if context.may_be_unwritable else ""
    if found := SURROGATE.search(dumped):
        raise unwritable(key, found[0])
    for part in _scalars(value):
        if (
            isinstance(part, str)
            and "u" not in context.escapes
            and (found := _CONTROL.search(part))
        ):
            raise unwritable(key, found[0])
        if isinstance(part, int | float) and not _fits(part):
            raise UnsupportedSchema(f"{key}: {part} has too many digits")


def unwritable(key: str, character: str) -> UnsupportedSchema:
    """The error for a character that an output cannot contain."""
    return UnsupportedSchema(f"{key}: character U+{ord(character):04X} cannot be written")


def _fits(number: int | float) -> bool:
    if isinstance(number, float):
        return parses_exactly(number)
    return abs(number) < _LARGEST and int(float(number)) == number


def parses_exactly(number: float) -> bool:
    """Whether llguidance parses it exactly: with more digits the last place may be off by one."""
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


def check_pattern(key: str, pattern: str, context: SchemaContext | None) -> None:
    """Raise UnsupportedSchema if strings of a pattern cannot be written.

    `context` None: the pattern is of names, which have no control characters.
    """
    if found := SURROGATE.search(pattern):
        raise unwritable(key, found[0])
    if (context is None or "u" not in context.escapes) and (found := _control_in(pattern)):
        raise UnsupportedSchema(f"{key}: control character {found[0]!a} cannot be written")


def _control_in(pattern: str) -> re.Match[str] | None:
    rest = _CLASS.sub(_narrow, pattern.replace("\\\\", ""))
    return _CONTROL.search(rest) or _CONTROL_ESCAPE.search(rest)


def _narrow(found: re.Match[str]) -> str:
    """A character class; "" if it is negated or has a range, and so has other characters too."""
    return "" if found[1].startswith("^") or _RANGE.search(found[1]) else found[0]


def names_have_variants(value: object) -> bool:
    """Whether \\u could give a second spelling of a name: of one with a control character, or of
    any given name where additional names are allowed.
    """
    for schema in objects_in(value):
        if any(_ANY_CONTROL.search(name) for name in schema):
            return True
        if schema.get("additionalProperties") is not False and any(map(schema.get, _NAMING)):
            return True
        required = schema.get("required")
        if isinstance(required, list) and any(_ANY_CONTROL.search(str(n)) for n in required):
            return True
    return False


def needs_unicode_escapes(value: object) -> bool:
    """Whether a constant or a pattern in it has a character that only \\u can express."""
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
