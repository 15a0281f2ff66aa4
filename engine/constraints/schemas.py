"""Rewrites a JSON schema so that llguidance enforces all of it, and outputs end.

llguidance refuses keywords that it does not support. What it accepts but does not enforce is
rewritten here, or refused with the reason:

    escapes        "f\\u006fo" is the property "foo", but llguidance reads another name. Without \\u
                   a name has one spelling. \\u is allowed if a constant needs it and all names are
                   given, or if the schema is lenient.
    long numbers   llguidance computes in doubles: bounds move inwards to the next double, and
                   constants that would be rounded are refused
    properties     masks cost too much if very many may come next
    minProperties  llguidance counts members, and an additional name may come twice
    x-guidance     llguidance's options in a schema: those that weaken it are refused
    oneOf          llguidance does not follow references to prove branches disjoint: see oneof.py

White space and times are bounded (digits of numbers: numbers.py). An unknown `format` is an
annotation, as in the standard, unless the schema is strict.

From a lenient schema (a tool's that is not strict) unsupported parts are dropped instead: a
keyword, or a value of an `enum`. leniency.py drops what only a compilation shows.

Keywords without effect (`uniqueItems: false`) are dropped, a count of 2.0 becomes 2, and https: and
http: in the URI of a draft are equal.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping

from engine.constraints.bounds import bound_lengths, check_counts, move_bounds
from engine.constraints.oneof import Branches
from engine.constraints.representable import (
    MAY_NEED_ESCAPES,
    SURROGATE,
    check_constant,
    check_pattern,
    names_have_variants,
    needs_unicode_escapes,
    read_json,
    sanitized,
    unwritable,
)
from engine.constraints.schema_context import Leniency, SchemaContext, UnsupportedSchema

ESCAPES = 'nrbtf\\"'  # characters that may follow a backslash in strings of outputs
# One or two blanks, or a line break with the indentation of the next line.
WHITE_SPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,40}"
# The formats that llguidance enforces.
FORMATS = frozenset(
    (
        *("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"),
        *("uri", "unknown"),
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


def prepare_schema(
    source: str, leniency: Leniency = Leniency.FORMATS, style: Mapping[str, object] | None = None
) -> str:
    """The schema, as JSON text, to compile in place of `source`.

    `style` replaces the `x-guidance` options of the schema. Raises UnsupportedSchema, and
    ValueError or RecursionError if `source` is not JSON.
    """
    lenient = leniency is Leniency.ALL
    schema, may_be_unwritable = read_json(source, lenient)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        return source
    schema = dict(schema)
    if found := _DRAFT.fullmatch(str(schema.get("$schema"))):
        if found[1] >= "draft-04":  # and so are draft/20..
            schema["$schema"] = _schema_uri(found[1])
        elif lenient:
            del schema["$schema"]
        else:
            raise UnsupportedSchema(
                f"$schema: {found[1]} is not served; draft-04 is the oldest that is"
            )
    has_const = not found or found[1] != "draft-04"
    # A $ref may point into a `oneOf`, which then has to keep its name.
    branches = None if "/oneOf/" in source else Branches(schema, has_const)
    own_options = schema.pop("x-guidance", {})
    is_plain = not MAY_NEED_ESCAPES.search(source)
    may_vary = lenient or not (is_plain or names_have_variants(schema))
    escapes = ESCAPES + "u" if may_vary else ESCAPES
    context = SchemaContext(branches, leniency, escapes, may_be_unwritable)
    kept = _object(schema, context)
    needs_all = not is_plain and needs_unicode_escapes(kept)
    options = _options(own_options) if style is None else dict(style)
    options["json_allowed_escapes"] = escapes if needs_all else ESCAPES
    if lenient:
        options["lenient"] = True
    if options.get("whitespace_flexible") is not False:
        options["whitespace_pattern"] = WHITE_SPACE
    return json.dumps({**kept, "x-guidance": options})


def check_formats(schema: object) -> None:
    """Raise UnsupportedSchema if a schema has an unknown format; RecursionError if too deep."""
    if isinstance(schema, list):
        for each in schema:
            check_formats(each)
    if not isinstance(schema, dict):
        return
    named = schema.get("format")
    if isinstance(named, str) and named not in FORMATS:
        raise _unknown_format(named)
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            check_formats(list(value.values()))
        elif key not in _DATA and key not in ("const", "enum"):
            check_formats(value)


def _unknown_format(name: str) -> UnsupportedSchema:
    known = ", ".join(sorted(FORMATS - {"unknown"}))
    return UnsupportedSchema(f"format: {sanitized(name)!r} is not known; known are {known}")


def _schema_uri(draft: str) -> str:
    return f"{'https' if '/' in draft else 'http'}://json-schema.org/{draft}/schema"


def _options(options: object) -> dict[str, object]:
    """Allow options of white space only: others weaken the schema, or the output is not JSON."""
    if not isinstance(options, dict):
        raise UnsupportedSchema("x-guidance: expected an object")
    for name, value in options.items():
        mark = {"item_separator": ",", "key_separator": ":"}.get(name)
        if name == "whitespace_flexible" or (mark and str(value).strip(" \t\n\r") == mark):
            continue
        if value is not False:
            raise UnsupportedSchema(f"x-guidance.{name}: not served")
    return dict(options)


def _schema(value: object, context: SchemaContext) -> object:
    """A schema or a list of schemas anywhere: a $ref may lead into an unknown keyword."""
    if isinstance(value, list):
        return [_schema(each, context) for each in value]
    if isinstance(value, dict):
        return _object(value, context)
    return sanitized(value) if context.may_be_unwritable else value


def _object(schema: dict[str, object], context: SchemaContext) -> dict[str, object]:
    kept: dict[str, object] = {}
    for key, value in schema.items():
        if _has_no_effect(key, value, schema, context):
            continue
        name = sanitized(key) if context.may_be_unwritable else key
        try:
            kept[name] = _keyword(key, value, context)
        except UnsupportedSchema as error:
            context.drop_or_raise(error)
    for closed, opened, inwards in (
        ("minimum", "exclusiveMinimum", math.inf),
        ("maximum", "exclusiveMaximum", -math.inf),
    ):
        try:
            move_bounds(kept, closed, opened, inwards)
        except UnsupportedSchema as error:
            context.drop_or_raise(error)
            kept.pop(closed, None), kept.pop(opened, None)
    bound_lengths(kept, context)
    check_counts(kept, context)
    branches, options = context.branches, schema.get("oneOf")
    if (
        branches is not None
        and isinstance(options, list)
        and "anyOf" not in schema
        and branches.are_disjoint(options, schema)
    ):
        kept["anyOf"] = kept.pop("oneOf")
    return kept


def _keyword(key: str, value: object, context: SchemaContext) -> object:
    if key in _MAPS and isinstance(value, dict):
        return dict(_entries(key, value, context))
    if key == "required" and isinstance(value, list):
        return [name for name in value if _is_representable(key, name, context)]
    if key in _DATA:
        return sanitized(value) if context.may_be_unwritable else value
    if key == "const":
        check_constant(key, value, context)
        return value
    if key == "enum":
        return _values(value, context)
    if key == "pattern" and isinstance(value, str):
        check_pattern(key, value, context)
    if isinstance(value, float) and not math.isfinite(value):
        raise UnsupportedSchema(f"{key}: {value} is not JSON")
    if key in _COUNTS and isinstance(value, float) and value.is_integer():
        return int(value)
    return _schema(value, context)


def _entries(
    key: str, entries: dict[str, object], context: SchemaContext
) -> Iterator[tuple[str, object]]:
    """The entries of a map of schemas whose names can be written."""
    for name, schema in entries.items():
        try:
            if key == "patternProperties":
                check_pattern(key, name, None)
        except UnsupportedSchema as error:
            context.drop_or_raise(error)
            continue
        if _is_representable(key, name, context):
            yield name, _schema(schema, context)


def _is_representable(key: str, name: object, context: SchemaContext) -> bool:
    found = SURROGATE.search(name) if context.may_be_unwritable and isinstance(name, str) else None
    if found:
        context.drop_or_raise(unwritable(key, found[0]))
        return False
    return True


def _values(value: object, context: SchemaContext) -> object:
    """The values of an `enum` that can be written."""
    if not isinstance(value, list):
        check_constant("enum", value, context)
        return value
    values, refusal = [], None
    for each in value:
        try:
            check_constant("enum", each, context)
            values.append(each)
        except UnsupportedSchema as found:
            context.drop_or_raise(found)
            refusal = found
    if refusal and not values:
        raise refusal  # none is left: the caller drops the keyword
    return values


def _has_no_effect(
    key: str, value: object, schema: dict[str, object], context: SchemaContext
) -> bool:
    """Whether a keyword that llguidance refuses has no effect."""
    match key:
        case "format" if isinstance(value, str) and value not in FORMATS:
            if context.leniency is Leniency.NONE:
                raise _unknown_format(value)
            return True
        case "uniqueItems":
            return value is False
        case "unevaluatedItems" | "unevaluatedProperties":
            return value is True
        case "minContains" | "maxContains":
            return "contains" not in schema
    return False
