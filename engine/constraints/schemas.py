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

What has no end gets one: white space and times (the digits of numbers: numbers.py). A `format` that
is not known is an annotation, as the standard has it, unless the schema must be held to the letter.

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

from engine.constraints.bounds import MOST_OPTIONAL, bound_lengths, check_counts, move_bounds
from engine.constraints.oneof import Branches
from engine.constraints.ways import Leniency, Refused, Ways
from engine.constraints.writable import (
    MAY_NEED_ESCAPES,
    SURROGATE,
    cannot_be_written,
    check_constant,
    check_pattern,
    names_vary,
    needs_unicode_escapes,
    plain,
    read_json,
)

__all__ = ["ESCAPES", "FORMATS", "MOST_OPTIONAL", "WHITE_SPACE", "Leniency", "Refused", "held"]

ESCAPES = 'nrbtf\\"'  # that strings of answers may have
# Two blanks, or one end of a line and what the next one is indented by.
WHITE_SPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,40}"
# Those that the library holds; of others it knows nothing.
FORMATS = frozenset(
    (
        *("date-time", "date", "time", "duration", "email", "hostname"),
        *("ipv4", "ipv6", "uuid", "uri", "unknown"),
    )
)
_MAPS = frozenset(
    ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
)
_DATA = frozenset(("default", "examples", "required", "dependentRequired", "x-guidance"))
_COUNTS = frozenset(
    ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
)
_DRAFT = re.compile(r"https?://json-schema\.org/(draft-0\d|draft/20\d\d-\d\d)/schema#?")


def held(
    source: str,
    leniency: Leniency = Leniency.FORMATS,
    style: Mapping[str, object] | None = None,
) -> str:
    """The schema to compile in place of this one. Raises Refused, ValueError, RecursionError.

    `style`: options of the library, in place of those in the schema.
    """
    lenient = leniency is Leniency.ALL
    schema, is_odd = read_json(source, lenient)
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
    is_plain = not MAY_NEED_ESCAPES.search(source)
    may_vary = lenient or not (is_plain or names_vary(schema))
    escapes = ESCAPES + "u" if may_vary else ESCAPES
    ways = Ways(apart, leniency, escapes, is_odd)
    kept = _object(schema, ways)
    needs_all = not is_plain and needs_unicode_escapes(kept)
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
    return Refused(f"format: {plain(name)!r} is not known; known are {known}")


def _name_of(draft: str) -> str:
    return f"{'https' if '/' in draft else 'http'}://json-schema.org/{draft}/schema"


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


def _schema(value: object, ways: Ways) -> object:
    """A schema, or a list of them, anywhere: a $ref may lead to where no keyword is known."""
    if isinstance(value, list):
        return [_schema(each, ways) for each in value]
    if isinstance(value, dict):
        return _object(value, ways)
    return plain(value) if ways.may_be_odd else value


def _object(schema: dict[str, object], ways: Ways) -> dict[str, object]:
    kept: dict[str, object] = {}
    for key, value in schema.items():
        if _idle(key, value, schema, ways):
            continue
        try:
            kept[plain(key) if ways.may_be_odd else key] = _keyword(key, value, ways)
        except Refused as why:
            ways.leave_out(why)
    for closed, opened, inwards in (
        ("minimum", "exclusiveMinimum", math.inf),
        ("maximum", "exclusiveMaximum", -math.inf),
    ):
        try:
            move_bounds(kept, closed, opened, inwards)
        except Refused as why:
            ways.leave_out(why)
            kept.pop(closed, None), kept.pop(opened, None)
    bound_lengths(kept, ways)
    check_counts(kept, ways)
    apart, options = ways.apart, schema.get("oneOf")
    if (
        apart is not None
        and isinstance(options, list)
        and "anyOf" not in schema
        and apart.exclude_each_other(options, schema)
    ):
        kept["anyOf"] = kept.pop("oneOf")
    return kept


def _keyword(key: str, value: object, ways: Ways) -> object:
    if key in _MAPS and isinstance(value, dict):
        return dict(_entries(key, value, ways))
    if key == "required" and isinstance(value, list):
        return [name for name in value if _is_written(key, name, ways)]
    if key in _DATA:
        return plain(value) if ways.may_be_odd else value
    if key == "const":
        check_constant(key, value, ways)
        return value
    if key == "enum":
        return _values(value, ways)
    if key == "pattern" and isinstance(value, str):
        check_pattern(key, value, ways)
    if isinstance(value, float) and not math.isfinite(value):
        raise Refused(f"{key}: {value} is not JSON")
    if key in _COUNTS and isinstance(value, float) and value.is_integer():
        return int(value)
    return _schema(value, ways)


def _entries(key: str, entries: dict[str, object], ways: Ways) -> Iterator[tuple[str, object]]:
    """Of a map of schemas, those whose name can be written."""
    for name, schema in entries.items():
        try:
            if key == "patternProperties":
                check_pattern(key, name, None)
        except Refused as why:
            ways.leave_out(why)
            continue
        if _is_written(key, name, ways):
            yield name, _schema(schema, ways)


def _is_written(key: str, name: object, ways: Ways) -> bool:
    found = SURROGATE.search(name) if ways.may_be_odd and isinstance(name, str) else None
    if found:
        ways.leave_out(cannot_be_written(key, found[0]))
        return False
    return True


def _values(value: object, ways: Ways) -> object:
    """Of an `enum`, those that can be written."""
    if not isinstance(value, list):
        check_constant("enum", value, ways)
        return value
    values, why = [], None
    for each in value:
        try:
            check_constant("enum", each, ways)
            values.append(each)
        except Refused as found:
            ways.leave_out(found)
            why = found
    if why and not values:
        raise why  # not one of them: then the keyword is left out
    return values


def _idle(key: str, value: object, schema: dict[str, object], ways: Ways) -> bool:
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
