"""JSON Schemas, so that llguidance holds all that they say.

The library refuses keywords that it does not know. What it would take, but not hold, is mended
here, or refused with the reason:

    escapes        "f\\u006fo" is the property "foo", and passes for another name: without \\u there
                   is one way to write a name. What only \\u can write cannot be asked for then.
    long numbers   it reckons in doubles: bounds move inwards to the next double, what would be
                   rounded is refused
    properties     of very many that may come next the masks cost too much, when it is too late
    minProperties  it counts members, and a free name may come twice
    x-guidance     its own options in a schema: those that make it hold less

    oneOf          it tells branches apart, but not through references: see apart.py

What says nothing by the standard (`uniqueItems: false`) is left out, 2.0 as a count is 2, and
https: and http: in the name of a draft are the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import NoReturn

from engine.constraints.apart import Branches

MOST_OPTIONAL = 480  # members in a row; beyond, a mask costs so much that answers would end there
ESCAPES = 'nrbtf\\"'  # that strings of answers may have
_MAPS = frozenset(
    ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
)
_DATA = frozenset(("default", "examples", "required", "dependentRequired", "x-guidance"))
_SAYS = frozenset(("type", "$ref", "const", "enum", "anyOf", "oneOf", "allOf"))
_COUNTS = frozenset(
    ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
)
_EXACT = 1 << 53  # integers up to here are doubles, and so are their neighbours
_LARGEST = 1 << 63  # of constants
_POWERS_OF_TEN = 22  # that are doubles
_DRAFT = re.compile(r"https?://json-schema\.org/(draft-0\d|draft/20\d\d-\d\d)/schema#?")
# Control characters that JSON writes with \u alone; in a pattern also by their escapes.
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_CONTROL_ESCAPE = re.compile(r"\\(x([01]|7[fF]|\{)|u(00[01]|007[fF]|\{)|c[A-Za-z]|[0vae])")
_WIDE_CLASS = re.compile(r"(?<!\\)\[(\^|[^\]]*[^\]\\]-)(\\.|[^\]\\])*\]", re.S)


class Refused(ValueError):
    """A schema that cannot be held; the message says why."""


def held(source: str) -> str:
    """The schema to compile in place of this one. Raises Refused, ValueError, RecursionError."""
    schema = json.loads(source, parse_constant=_no_constant)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        return source
    if found := _DRAFT.fullmatch(str(schema.get("$schema"))):
        schema = {**schema, "$schema": _name_of(found[1])}
    has_const = not found or found[1] != "draft-04"
    apart = None if "/oneOf/" in source else Branches(schema, has_const)  # a $ref leads there
    options = {**_options(schema.get("x-guidance", {})), "json_allowed_escapes": ESCAPES}
    return json.dumps({**_object(schema, apart), "x-guidance": options})


def _name_of(draft: str) -> str:
    if draft < "draft-04":  # and so are draft/20..
        raise Refused(f"$schema: {draft} is not served; draft-04 is the oldest that is")
    return f"{'https' if '/' in draft else 'http'}://json-schema.org/{draft}/schema"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _options(options: object) -> dict[str, object]:
    """White space may be chosen; what else can be said there would hold less, or not be JSON."""
    if not isinstance(options, dict):
        raise Refused("x-guidance: expected an object")
    for name, value in options.items():
        mark = {"item_separator": ",", "key_separator": ":"}.get(name)
        if name == "whitespace_flexible" or (mark and str(value).strip(" \t\n\r") == mark):
            continue
        if value is not False:
            raise Refused(f"x-guidance.{name}: not served")
    return dict(options)


def _schema(value: object, apart: Branches | None) -> object:
    """A schema, or a list of them, anywhere: a $ref may lead to where no keyword is known."""
    if isinstance(value, list):
        return [_schema(each, apart) for each in value]
    return _object(value, apart) if isinstance(value, dict) else value


def _object(schema: dict[str, object], apart: Branches | None) -> dict[str, object]:
    kept = {
        key: _keyword(key, value, apart)
        for key, value in schema.items()
        if not _idle(key, value, schema)
    }
    _move_bounds(kept, "minimum", "exclusiveMinimum", math.inf)
    _move_bounds(kept, "maximum", "exclusiveMaximum", -math.inf)
    _check_counts(kept)
    options = schema.get("oneOf") if apart and "anyOf" not in schema else None
    if isinstance(options, list) and apart and apart.exclude_each_other(options, schema):
        kept["anyOf"] = kept.pop("oneOf")
    return kept


def _keyword(key: str, value: object, apart: Branches | None) -> object:
    if key in _MAPS and isinstance(value, dict):
        if key == "patternProperties":
            for pattern in value:
                _check_pattern(key, pattern)
        return {name: _schema(each, apart) for name, each in value.items()}
    if key in _DATA:
        return value
    if key in ("const", "enum"):
        _check_constant(key, value)
        return value
    if key == "pattern" and isinstance(value, str):
        _check_pattern(key, value)
    if key in _COUNTS and isinstance(value, float) and value.is_integer():
        return int(value)
    return _schema(value, apart)


def _idle(key: str, value: object, schema: dict[str, object]) -> bool:
    """Whether it says nothing, although the library would refuse it."""
    match key:
        case "uniqueItems":
            return value is False
        case "unevaluatedItems" | "unevaluatedProperties":
            return value is True
        case "minContains" | "maxContains":
            return "contains" not in schema
    return False


def _move_bounds(schema: dict[str, object], closed: str, opened: str, inwards: float) -> None:
    """Bounds that are no doubles, or whose neighbours are none, into what they allow."""
    for key in (closed, opened):
        bound = schema.get(key)
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            continue
        if isinstance(bound, float) and not _is_read_well(bound):
            raise Refused(f"{key}: {bound} has too many digits")
        if abs(bound) < _EXACT:
            continue
        try:
            moved = float(bound)
        except OverflowError:
            raise Refused(f"{key}: too large") from None
        outside = moved < bound if inwards > 0 else moved > bound
        if outside or key == opened or schema.get(opened) is True:
            moved = math.nextafter(moved, inwards)
        schema[key] = int(moved)


def _check_counts(schema: dict[str, object]) -> None:
    least, properties = schema.get("minProperties"), schema.get("properties", {})
    required = schema.get("required", [])
    if not isinstance(properties, dict):
        return
    required = required if isinstance(required, list) else []
    if (most := _longest_choice(properties, {*map(str, required)})) > MOST_OPTIONAL:
        raise Refused(f"properties: {most} to choose from; expected at most {MOST_OPTIONAL}")
    if not isinstance(least, int):
        return
    if schema.get("additionalProperties") is False and not schema.get("patternProperties"):
        return
    names = {*properties, *map(str, required)}
    if least > (most := len(names) + 1):
        raise Refused(f"minProperties: {least}, but only {most} can be told apart by their names")


def _longest_choice(properties: dict[str, object], required: set[str]) -> int:
    """How many members may come next at one place; those of any value weigh three times as much."""
    longest = run = 0
    for name, schema in properties.items():
        says = isinstance(schema, dict) and not schema.keys().isdisjoint(_SAYS)
        run = 0 if name in required else run + (1 if says else 3)
        longest = max(longest, run)
    return longest


def _check_constant(key: str, value: object) -> None:
    for part in _scalars(value):
        if isinstance(part, str) and (found := _CONTROL.search(part)):
            raise Refused(f"{key}: character U+{ord(found[0]):04X} cannot be written")
        if isinstance(part, int | float) and not _fits(part):
            raise Refused(f"{key}: {part} has too many digits")


def _fits(number: int | float) -> bool:
    if isinstance(number, float):
        return _is_read_well(number)
    return abs(number) < _LARGEST and int(float(number)) == number


def _is_read_well(number: float) -> bool:
    """The library reads decimals of more digits one off in the last place."""
    if not math.isfinite(number):
        return False
    _, digits, exponent = Decimal(repr(number)).as_tuple()
    return int("".join(map(str, digits))) < _EXACT and abs(int(exponent)) <= _POWERS_OF_TEN


def _scalars(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _scalars(each)
    else:
        yield value


def _check_pattern(key: str, pattern: str) -> None:
    rest = _WIDE_CLASS.sub("", pattern.replace("\\\\", ""))
    if found := _CONTROL.search(rest) or _CONTROL_ESCAPE.search(rest):
        raise Refused(f"{key}: control character {found[0]!a} cannot be written")
