"""Numeric bounds, lengths and member counts of a schema, within what llguidance can enforce."""

from __future__ import annotations

import math
from decimal import Decimal

from engine.constraints.representable import EXACT, parses_exactly
from engine.constraints.schema_context import SchemaContext, UnsupportedSchema

MAX_OPTIONAL = 480  # consecutive optional members; more make a mask exceed its cost limit
_CONSTRAINING_KEYS = frozenset(("type", "$ref", "const", "enum", "anyOf", "oneOf", "allOf"))
_MAX_LENGTHS = {"date-time": 35, "time": 24, "duration": 40}  # nanoseconds, an offset
_MAX_REMAINDERS = 100_000  # of integers; compiling this many takes seconds
_MAX_STEP = 10**64  # larger numbers take long to factor
_MAX_BOUND = 9223372036854774784  # last double below 2^63: llguidance has 64-bit integers


def move_bounds(schema: dict[str, object], closed: str, opened: str, inwards: float) -> None:
    """Move bounds that a double cannot represent exactly to the next double they allow.

    `inwards` is the infinity towards which the allowed range lies. Raises UnsupportedSchema.
    """
    for key in (closed, opened):
        bound = schema.get(key)
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            continue
        if abs(bound) > _MAX_BOUND:
            if (bound < 0) != (inwards > 0):
                raise UnsupportedSchema(f"{key}: {bound} leaves no number of 64 bits")
            schema[key] = _MAX_BOUND if bound > 0 else -_MAX_BOUND
            continue
        if isinstance(bound, float) and not parses_exactly(bound):
            raise UnsupportedSchema(f"{key}: {bound} has too many digits")
        if abs(bound) < EXACT:
            continue
        moved = float(bound)
        outside = moved < bound if inwards > 0 else moved > bound
        if outside or key == opened or schema.get(opened) is True:
            moved = math.nextafter(moved, inwards)
        schema[key] = int(moved)


def bound_lengths(schema: dict[str, object], context: SchemaContext) -> None:
    """Bound the length of times and durations, and refuse or drop a costly `multipleOf`."""
    longest = _MAX_LENGTHS.get(str(schema.get("format")), 0)
    minimum, maximum = schema.get("minLength", 0), schema.get("maxLength")
    if longest and isinstance(minimum, int):
        longest = max(longest, minimum)
        if maximum is None or (isinstance(maximum, int) and maximum > longest):
            schema["maxLength"] = longest
    step = schema.get("multipleOf")
    if isinstance(step, bool) or not isinstance(step, int | float):
        return
    if abs(step) > _MAX_STEP:
        context.drop_or_raise(UnsupportedSchema("multipleOf: too many digits"))
        del schema["multipleOf"]
        return
    if not math.isfinite(step):
        return
    digits = Decimal(repr(step)).normalize().as_tuple()
    coefficient = int("".join(map(str, digits.digits))) * 10 ** max(0, int(digits.exponent))
    is_whole = float(step).is_integer() or "integer" in str(schema.get("type"))
    if is_whole and _without(2, _without(5, coefficient)) > _MAX_REMAINDERS:
        context.drop_or_raise(UnsupportedSchema(f"multipleOf: {step} has too many digits"))
        del schema["multipleOf"]


def _without(factor: int, number: int) -> int:
    while number and number % factor == 0:
        number //= factor
    return number


def check_counts(schema: dict[str, object], context: SchemaContext) -> None:
    """Refuse or drop properties that are too many, and a `minProperties` that cannot be counted.

    Raises UnsupportedSchema.
    """
    minimum, properties = schema.get("minProperties"), schema.get("properties", {})
    required = schema.get("required", [])
    if not isinstance(properties, dict):
        return
    required = required if isinstance(required, list) else []
    names = {*map(str, required)}
    if (maximum := _longest_choice(properties, names)) > MAX_OPTIONAL:
        reason = f"properties: {maximum} to choose from; expected at most {MAX_OPTIONAL}"
        context.drop_or_raise(UnsupportedSchema(reason))
        schema["properties"] = _largest_subset(properties, names)
        schema.pop("additionalProperties", None)  # the dropped properties stay allowed
    if not isinstance(minimum, int):
        return
    if schema.get("additionalProperties") is False and not schema.get("patternProperties"):
        return
    names |= {*properties}
    if minimum > (maximum := len(names) + 1):
        reason = f"minProperties: {minimum}, but only {maximum} names are certain to differ"
        context.drop_or_raise(UnsupportedSchema(reason))
        del schema["minProperties"]


def _largest_subset(properties: dict[str, object], required: set[str]) -> dict[str, object]:
    """The required properties, and the first optional ones up to MAX_OPTIONAL."""
    kept: dict[str, object] = {}
    weight = 0
    for name, schema in properties.items():
        weight += 0 if name in required else _weight(schema)
        if name in required or weight <= MAX_OPTIONAL:
            kept[name] = schema
    return kept


def _weight(schema: object) -> int:
    """Relative mask cost of an optional member; an unconstrained value costs three times more."""
    is_typed = isinstance(schema, dict) and not schema.keys().isdisjoint(_CONSTRAINING_KEYS)
    return 1 if is_typed else 3


def _longest_choice(properties: dict[str, object], required: set[str]) -> int:
    """The largest weight of members that may come next at one position."""
    longest = run = 0
    for name, schema in properties.items():
        run = 0 if name in required else run + _weight(schema)
        longest = max(longest, run)
    return longest
