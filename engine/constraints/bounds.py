"""Bounds and counts of a schema, as the library can hold them, and an end for times."""

from __future__ import annotations

import math
from decimal import Decimal

from engine.constraints.ways import Refused, Ways
from engine.constraints.writable import EXACT, is_read_well

MOST_OPTIONAL = 480  # members in a row; beyond, a mask costs so much that answers would end there
_SAYS = frozenset(("type", "$ref", "const", "enum", "anyOf", "oneOf", "allOf"))
_LONGEST = {"date-time": 35, "time": 24, "duration": 40}  # nanoseconds, an offset
_MOST_REMAINDERS = 100_000  # of whole numbers; these alone take seconds to compile
_MOST_STEP = 10**64  # a factor of such a number takes long to find, and no answer has one
_FARTHEST = 9223372036854774784  # the last double below 2^63; the library's integers end there


def move_bounds(schema: dict[str, object], closed: str, opened: str, inwards: float) -> None:
    """Bounds that are no doubles, or whose neighbours are none, into what they allow."""
    for key in (closed, opened):
        bound = schema.get(key)
        if isinstance(bound, bool) or not isinstance(bound, int | float):
            continue
        if abs(bound) > _FARTHEST:
            if (bound < 0) != (inwards > 0):
                raise Refused(f"{key}: {bound} leaves no number of 64 bits")
            schema[key] = _FARTHEST if bound > 0 else -_FARTHEST
            continue
        if isinstance(bound, float) and not is_read_well(bound):
            raise Refused(f"{key}: {bound} has too many digits")
        if abs(bound) < EXACT:
            continue
        moved = float(bound)
        outside = moved < bound if inwards > 0 else moved > bound
        if outside or key == opened or schema.get(opened) is True:
            moved = math.nextafter(moved, inwards)
        schema[key] = int(moved)


def bound_lengths(schema: dict[str, object], ways: Ways) -> None:
    """An end for times, and no multiples that are too costly."""
    longest = _LONGEST.get(str(schema.get("format")), 0)
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    if longest and isinstance(least, int):
        longest = max(longest, least)
        if most is None or (isinstance(most, int) and most > longest):
            schema["maxLength"] = longest
    step = schema.get("multipleOf")
    if isinstance(step, bool) or not isinstance(step, int | float):
        return
    if abs(step) > _MOST_STEP:
        ways.leave_out(Refused("multipleOf: too many digits"))
        del schema["multipleOf"]
        return
    if not math.isfinite(step):
        return
    digits = Decimal(repr(step)).normalize().as_tuple()
    coefficient = int("".join(map(str, digits.digits))) * 10 ** max(0, int(digits.exponent))
    is_whole = float(step).is_integer() or "integer" in str(schema.get("type"))
    if is_whole and _without(2, _without(5, coefficient)) > _MOST_REMAINDERS:
        ways.leave_out(Refused(f"multipleOf: {step} has too many digits"))
        del schema["multipleOf"]


def _without(factor: int, number: int) -> int:
    while number and number % factor == 0:
        number //= factor
    return number


def check_counts(schema: dict[str, object], ways: Ways) -> None:
    """Raise Refused, or leave out, where members are too many or cannot be counted."""
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
