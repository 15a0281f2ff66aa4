"""JSON Schemas, so that llguidance holds all that they say, and answers come to an end.

The library refuses keywords that it does not know. What it would take, but not hold, is mended
here, or refused with the reason:

    escapes        "f\\u006fo" is the property "foo", and passes for another name: without \\u there
                   is one way to write a name. It is allowed where a constant needs it and all
                   names are given, or the schema is lenient.
    long numbers   it reckons in doubles: bounds move inwards to the next double, what would be
                   rounded is refused
    properties     of very many that may come next the masks cost too much, when it is too late
    minProperties  it counts members, and a free name may come twice
    x-guidance     its own options in a schema: those that make it hold less

    oneOf          it tells branches apart, but not through references: see apart.py

What has no end gets one: white space, the digits of multiples and of times (the digits of other
numbers: numbers.py). A `format` that is not known is an annotation, as the standard has it, unless
the schema must be held to the letter.

A lenient schema (a tool's that is not strict) goes the same way, and what would be refused is left
out: a keyword, or one of the values of an `enum`. What only a compilation shows is left out by
leniency.py.

What says nothing by the standard (`uniqueItems: false`) is left out, 2.0 as a count is 2, and
https: and http: in the name of a draft are the same.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Any, NoReturn

from engine.constraints.apart import Branches

MOST_OPTIONAL = 480  # members in a row; beyond, a mask costs so much that answers would end there
ESCAPES = 'nrbtf\\"'  # that strings of answers may have
# Two blanks, or one end of a line and what the next one is indented by.
WHITE_SPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,24}"
# Those that the library holds; of others it knows nothing.
FORMATS = frozenset(
    (
        *("date-time", "date", "time", "duration", "email", "hostname"),
        *("ipv4", "ipv6", "uuid", "uri", "unknown"),
    )
)
_LONGEST = {"date-time": 35, "time": 24, "duration": 40}  # nanoseconds, an offset
_MOST_MULTIPLE = 1000  # beyond, the states of digits and remainders are too many
_BOUND_OF_MULTIPLES = 9223372036854774784  # the last double below 2^63
_MAPS = frozenset(
    ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
)
_DATA = frozenset(("default", "examples", "required", "dependentRequired", "x-guidance"))
_NAMING = ("properties", "patternProperties", "required")
_SAYS = frozenset(("type", "$ref", "const", "enum", "anyOf", "oneOf", "allOf"))
_COUNTS = frozenset(
    ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
)
_EXACT = 1 << 53  # integers up to here are doubles, and so are their neighbours
_LARGEST = 1 << 63  # of constants
_POWERS_OF_TEN = 22  # that are doubles
_DRAFT = re.compile(r"https?://json-schema\.org/(draft-0\d|draft/20\d\d-\d\d)/schema#?")
_SURROGATE = re.compile("[\ud800-\udfff]")  # one by itself is no character
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
# Control characters that JSON writes with \u alone; in a pattern also by their escapes.
_CONTROL = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")
_MAY_NEED_ESCAPES = re.compile(r"\\u00[01]|\\u007[fF]|\x7f|\\\\[xuc0vae]")
_ANY_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CONTROL_ESCAPE = re.compile(r"\\(x([01]|7[fF]|\{)|u(00[01]|007[fF]|\{)|c[A-Za-z]|[0vae])")
_WIDE_CLASS = re.compile(r"(?<!\\)\[(\^|[^\]]*[^\]\\]-)(\\.|[^\]\\])*\]", re.S)


class Leniency(Enum):
    """What is done about a part that cannot be held."""

    NONE = "none"  # it is refused, an unknown format too
    FORMATS = "formats"  # it is refused, an unknown format is an annotation
    ALL = "all"  # it is left out


class Refused(ValueError):
    """A schema that cannot be held; the message says why."""


@dataclass(frozen=True, slots=True)
class _Ways:
    """How a document is read."""

    apart: Branches | None
    leniency: Leniency
    escapes: str
    may_be_odd: bool  # whether surrogates or numbers without an end may be in it

    def leave_out(self, why: Refused) -> None:
        """Raise the reason where nothing may be left out."""
        if self.leniency is not Leniency.ALL:
            raise why


def held(
    source: str,
    leniency: Leniency = Leniency.FORMATS,
    style: Mapping[str, object] | None = None,
) -> str:
    """The schema to compile in place of this one. Raises Refused, ValueError, RecursionError.

    `style`: options of the library, in place of those in the schema.
    """
    lenient = leniency is Leniency.ALL
    schema, is_odd = _read(source, lenient)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        return source
    schema = dict(schema)
    if found := _DRAFT.fullmatch(str(schema.get("$schema"))):
        if found[1] >= "draft-04":  # and so are draft/20..
            schema["$schema"] = _name_of(found[1])
        elif lenient:
            del schema["$schema"]
        else:
            raise Refused(f"$schema: {found[1]} is not served; draft-04 is the oldest that is")
    has_const = not found or found[1] != "draft-04"
    apart = None if "/oneOf/" in source else Branches(schema, has_const)  # a $ref leads there
    own = schema.pop("x-guidance", {})
    is_plain = not _MAY_NEED_ESCAPES.search(source)
    may_vary = lenient or not (is_plain or _names_vary(schema))
    escapes = ESCAPES + "u" if may_vary else ESCAPES
    ways = _Ways(apart, leniency, escapes, is_odd)
    kept = _object(schema, ways)
    needs_all = not is_plain and _needs_unicode_escapes(kept)
    options = _options(own) if style is None else dict(style)
    options["json_allowed_escapes"] = escapes if needs_all else ESCAPES
    if lenient:
        options["lenient"] = True
    if options.get("whitespace_flexible") is not False:
        options["whitespace_pattern"] = WHITE_SPACE
    return json.dumps({**kept, "x-guidance": options})


def check_formats(schema: object) -> None:
    """Raise Refused where a schema has a format that is not known; RecursionError."""
    if isinstance(schema, list):
        for each in schema:
            check_formats(each)
    if not isinstance(schema, dict):
        return
    named = schema.get("format")
    if isinstance(named, str) and named not in FORMATS:
        raise _not_known(named)
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            check_formats(list(value.values()))
        elif key not in _DATA and key not in ("const", "enum"):
            check_formats(value)


def _not_known(name: str) -> Refused:
    known = ", ".join(sorted(FORMATS - {"unknown"}))
    return Refused(f"format: {_plain(name)!r} is not known; known are {known}")


def _name_of(draft: str) -> str:
    return f"{'https' if '/' in draft else 'http'}://json-schema.org/{draft}/schema"


def _read(source: str, lenient: bool) -> tuple[object, bool]:
    """The value of a JSON text, and whether surrogates or numbers without an end may be in it."""
    is_odd = _SURROGATE_ESCAPE.search(source) is not None
    is_odd = is_odd or (not source.isascii() and _SURROGATE.search(source) is not None)

    def number(text: str) -> float:
        nonlocal is_odd
        value = float(text)
        is_odd = is_odd or not math.isfinite(value)
        return value

    constant = number if lenient else _no_constant
    return json.loads(source, parse_float=number, parse_constant=constant), is_odd


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


def _schema(value: object, ways: _Ways) -> object:
    """A schema, or a list of them, anywhere: a $ref may lead to where no keyword is known."""
    if isinstance(value, list):
        return [_schema(each, ways) for each in value]
    if isinstance(value, dict):
        return _object(value, ways)
    return _plain(value) if ways.may_be_odd else value


def _object(schema: dict[str, object], ways: _Ways) -> dict[str, object]:
    kept: dict[str, object] = {}
    for key, value in schema.items():
        if _idle(key, value, schema, ways):
            continue
        try:
            kept[_plain(key) if ways.may_be_odd else key] = _keyword(key, value, ways)
        except Refused as why:
            ways.leave_out(why)
    for closed, opened, inwards in (
        ("minimum", "exclusiveMinimum", math.inf),
        ("maximum", "exclusiveMaximum", -math.inf),
    ):
        try:
            _move_bounds(kept, closed, opened, inwards)
        except Refused as why:
            ways.leave_out(why)
            kept.pop(closed, None), kept.pop(opened, None)
    _bound(kept)
    _check_counts(kept, ways)
    apart, options = ways.apart, schema.get("oneOf")
    if (
        apart is not None
        and isinstance(options, list)
        and "anyOf" not in schema
        and apart.exclude_each_other(options, schema)
    ):
        kept["anyOf"] = kept.pop("oneOf")
    return kept


def _keyword(key: str, value: object, ways: _Ways) -> object:
    if key in _MAPS and isinstance(value, dict):
        return dict(_entries(key, value, ways))
    if key == "required" and isinstance(value, list):
        return [name for name in value if _is_written(key, name, ways)]
    if key in _DATA:
        return _plain(value) if ways.may_be_odd else value
    if key == "const":
        _check_constant(key, value, ways)
        return value
    if key == "enum":
        return _values(value, ways)
    if key == "pattern" and isinstance(value, str):
        _check_pattern(key, value, ways)
    if isinstance(value, float) and not math.isfinite(value):
        raise Refused(f"{key}: {value} is not JSON")
    if key in _COUNTS and isinstance(value, float) and value.is_integer():
        return int(value)
    return _schema(value, ways)


def _entries(key: str, entries: dict[str, object], ways: _Ways) -> Iterator[tuple[str, object]]:
    """Of a map of schemas, those whose name can be written."""
    for name, schema in entries.items():
        try:
            if key == "patternProperties":
                _check_pattern(key, name, None)
        except Refused as why:
            ways.leave_out(why)
            continue
        if _is_written(key, name, ways):
            yield name, _schema(schema, ways)


def _is_written(key: str, name: object, ways: _Ways) -> bool:
    found = _SURROGATE.search(name) if ways.may_be_odd and isinstance(name, str) else None
    if found:
        ways.leave_out(_cannot_be_written(key, found[0]))
        return False
    return True


def _values(value: object, ways: _Ways) -> object:
    """Of an `enum`, those that can be written."""
    if not isinstance(value, list):
        _check_constant("enum", value, ways)
        return value
    values, why = [], None
    for each in value:
        try:
            _check_constant("enum", each, ways)
            values.append(each)
        except Refused as found:
            ways.leave_out(found)
            why = found
    if why and not values:
        raise why  # not one of them: then the keyword is left out
    return values


def _plain(value: Any) -> Any:
    """The same without what the library could not read."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {_plain(name): _plain(each) for name, each in value.items()}
    return value


def _idle(key: str, value: object, schema: dict[str, object], ways: _Ways) -> bool:
    """Whether it says nothing, although the library would refuse it."""
    match key:
        case "format" if isinstance(value, str) and value not in FORMATS:
            if ways.leniency is Leniency.NONE:
                raise _not_known(value)
            return True
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


def _bound(schema: dict[str, object]) -> None:
    """An end for what has none and does not end by the masks alone."""
    longest = _LONGEST.get(str(schema.get("format")), 0)
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    is_longer = most is None or (isinstance(most, int) and most > longest)
    if is_longer and longest and isinstance(least, int) and least <= longest:
        schema["maxLength"] = longest
    step = schema.get("multipleOf")
    if isinstance(step, bool) or not isinstance(step, int | float) or not math.isfinite(step):
        return
    digits = Decimal(repr(step)).normalize().as_tuple()
    coefficient = int("".join(map(str, digits.digits))) * 10 ** max(0, int(digits.exponent))
    if coefficient <= _MOST_MULTIPLE:
        if "minimum" not in schema and "exclusiveMinimum" not in schema:
            schema["minimum"] = -_BOUND_OF_MULTIPLES
        if "maximum" not in schema and "exclusiveMaximum" not in schema:
            schema["maximum"] = _BOUND_OF_MULTIPLES


def _check_counts(schema: dict[str, object], ways: _Ways) -> None:
    least, properties = schema.get("minProperties"), schema.get("properties", {})
    required = schema.get("required", [])
    if not isinstance(properties, dict):
        return
    required = required if isinstance(required, list) else []
    names = {*map(str, required)}
    if (most := _longest_choice(properties, names)) > MOST_OPTIONAL:
        reason = f"properties: {most} to choose from; expected at most {MOST_OPTIONAL}"
        ways.leave_out(Refused(reason))
        schema["properties"] = _fewer(properties, names)
        schema.pop("additionalProperties", None)  # the others may come by their names
    if not isinstance(least, int):
        return
    if schema.get("additionalProperties") is False and not schema.get("patternProperties"):
        return
    names |= {*properties}
    if least > (most := len(names) + 1):
        reason = f"minProperties: {least}, but only {most} can be told apart by their names"
        ways.leave_out(Refused(reason))
        del schema["minProperties"]


def _fewer(properties: dict[str, object], required: set[str]) -> dict[str, object]:
    """Those that must be there, and the first of the others as far as they go."""
    kept: dict[str, object] = {}
    weight = 0
    for name, schema in properties.items():
        weight += 0 if name in required else _weight(schema)
        if name in required or weight <= MOST_OPTIONAL:
            kept[name] = schema
    return kept


def _weight(schema: object) -> int:
    """Of a member that may come next; those of any value weigh three times as much."""
    says = isinstance(schema, dict) and not schema.keys().isdisjoint(_SAYS)
    return 1 if says else 3


def _longest_choice(properties: dict[str, object], required: set[str]) -> int:
    """How many members may come next at one place, by their weight."""
    longest = run = 0
    for name, schema in properties.items():
        run = 0 if name in required else run + _weight(schema)
        longest = max(longest, run)
    return longest


def _check_constant(key: str, value: object, ways: _Ways) -> None:
    dumped = json.dumps(value, ensure_ascii=False) if ways.may_be_odd else ""
    if found := _SURROGATE.search(dumped):
        raise _cannot_be_written(key, found[0])
    for part in _scalars(value):
        if isinstance(part, str) and "u" not in ways.escapes and (found := _CONTROL.search(part)):
            raise _cannot_be_written(key, found[0])
        if isinstance(part, int | float) and not _fits(part):
            raise Refused(f"{key}: {part} has too many digits")


def _cannot_be_written(key: str, character: str) -> Refused:
    return Refused(f"{key}: character U+{ord(character):04X} cannot be written")


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


def _check_pattern(key: str, pattern: str, ways: _Ways | None) -> None:
    """`ways`: how its strings may be written; None: as names, which have no control characters."""
    if found := _SURROGATE.search(pattern):
        raise _cannot_be_written(key, found[0])
    if (ways is None or "u" not in ways.escapes) and (found := _control_in(pattern)):
        raise Refused(f"{key}: control character {found[0]!a} cannot be written")


def _control_in(pattern: str) -> re.Match[str] | None:
    rest = _WIDE_CLASS.sub("", pattern.replace("\\\\", ""))
    return _CONTROL.search(rest) or _CONTROL_ESCAPE.search(rest)


def _names_vary(value: object) -> bool:
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
    return isinstance(value, list) and any(map(_names_vary, value))


def _needs_unicode_escapes(value: object) -> bool:
    """Whether a constant or a pattern in it has a character that only \\u can write."""
    if isinstance(value, list):
        return any(map(_needs_unicode_escapes, value))
    if not isinstance(value, dict):
        return False
    for key, each in value.items():
        if key in ("const", "enum"):
            if any(isinstance(part, str) and _CONTROL.search(part) for part in _scalars(each)):
                return True
        elif key == "pattern" and isinstance(each, str):
            if _control_in(each):
                return True
        elif _needs_unicode_escapes(each):
            return True
    return False
