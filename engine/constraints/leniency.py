"""Reduces a lenient schema to the largest part that compiles, by trial compilations.

schemas.py leaves out what is known not to work; only a compilation shows the rest:

    schema --_flatten--> a main schema and definitions; references lead to definitions only
           1. each alone, with definitions that allow anything in place of the others:
              subschemas are reduced first, innermost first;
              then keywords are added one by one, and those that compile together stay
           2. all together; if that fails, definitions are reduced one by one

The number of compilations and their time are bounded; beyond that any JSON object is allowed.
Unless the time runs out the result depends on the schema alone, so a second coordinator can
continue an output of the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from engine.constraints.json_walk import at_pointer, objects_in

_MAX_TRIES = 400
_MAX_CPU_S = 1.0  # well below the limit of a job: see checker.py
_MAPS = frozenset(("properties", "patternProperties", "dependentSchemas"))
_LISTS = frozenset(("anyOf", "oneOf", "allOf", "prefixItems", "items"))
_SINGLE = frozenset(("items", "additionalProperties", "additionalItems"))
_ALL_HOLD = frozenset(("allOf", "required"))
_DATA = frozenset(("const", "enum", "default", "examples"))
# Keywords that constrain most are added first.
_ORDER = ("type", "properties", "required", "items", "$ref", "enum", "const", "anyOf", "oneOf")
Schema = dict[str, Any]
Compiles = Callable[[Schema], bool]


class _BudgetExhausted(Exception):
    """Too many compilations, or too much time."""


def compilable_part(schema: Schema, compiles: Compiles, begun_s: float | None = None) -> Schema:
    """The part of an object schema that compiles; it allows every value that `schema` allows.

    `begun_s`: thread time at which the work on this schema began; default: now.
    """
    num_left = _MAX_TRIES
    until_s = (time.thread_time() if begun_s is None else begun_s) + _MAX_CPU_S

    def compiles_in_budget(part: Schema) -> bool:
        nonlocal num_left
        num_left -= 1
        if num_left < 0 or time.thread_time() > until_s:
            raise _BudgetExhausted
        return compiles(part)

    try:
        return _compilable_part(schema, compiles_in_budget)
    except (_BudgetExhausted, RecursionError):
        return {"type": "object"}


def _compilable_part(schema: Schema, compiles: Compiles) -> Schema:
    main, parts = _flatten(schema)
    anything: Schema = {name: {} for name in parts}

    def alone(part: Schema) -> bool:
        return compiles({**part, "$defs": anything} if anything else part)

    main = _compilable(main, alone)
    parts = {name: _compilable(part, alone) for name, part in parts.items()}
    whole = {**main, "$defs": parts} if parts else main
    if not parts or compiles(whole):
        return whole
    kept = dict(anything)
    for name, part in parts.items():

        def among(some: Schema, name: str = name) -> bool:
            return compiles({**main, "$defs": {**kept, name: some}})

        kept[name] = _compilable(part, among)
    return {**main, "$defs": kept}


def _compilable(schema: Any, compiles: Compiles) -> Any:
    """The part of one schema that compiles; {} if no part does."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        return {}
    if compiles(schema):
        return schema
    inner = {key: _inside(key, value, compiles) for key, value in schema.items()}
    if compiles(inner):
        return inner
    kept: Schema = {}
    for key in sorted(inner, key=lambda k: _ORDER.index(k) if k in _ORDER else len(_ORDER)):

        def fits(value: Any, key: str = key) -> bool:
            return compiles(_in_order({**kept, key: value}, inner))

        if fits(inner[key]):
            kept[key] = inner[key]
        elif (fewer := _largest_subset(key, inner[key], fits)) is not None:
            kept[key] = fewer
    return _in_order(kept, inner)


def _largest_subset(key: str, value: Any, fits: Callable[[Any], bool]) -> Any:
    """The entries of a keyword that compile together, if dropping entries only allows more."""
    if key in _ALL_HOLD and isinstance(value, list):
        some: list[Any] = []
        for each in value:
            if fits([*some, each]):
                some.append(each)
        return some or None
    if key in ("properties", "patternProperties") and isinstance(value, dict):
        entries: Schema = {}
        for name, each in value.items():
            if fits({**entries, name: each}):
                entries[name] = each
            elif key == "properties" and fits({**entries, name: {}}):
                entries[name] = {}
        return entries or None
    return None


def _in_order(some: Schema, all_: Schema) -> Schema:
    """`some` in the order of `all_`: the order of properties is the order of members."""
    return {key: some[key] for key in all_ if key in some}


def _inside(key: str, value: Any, compiles: Compiles) -> Any:
    if key in _MAPS and isinstance(value, dict):
        return {name: _compilable(each, compiles) for name, each in value.items()}
    if key in _LISTS and isinstance(value, list):
        return [_compilable(each, compiles) for each in value]
    if key in _SINGLE and isinstance(value, dict):
        return _compilable(value, compiles)
    return value


def _flatten(schema: Schema) -> tuple[Schema, dict[str, Any]]:
    """The main schema, and the targets of references as definitions; dangling ones are dropped."""
    names: dict[str, str] = {}
    parts: dict[str, Any] = {}

    def copy_of(value: Any, is_data: bool = False) -> Any:
        if isinstance(value, list):
            return [copy_of(each, is_data) for each in value]
        if not isinstance(value, dict) or is_data:
            return value
        kept = {}
        for key, each in value.items():
            if key in ("$defs", "definitions") and isinstance(each, dict) and value is schema:
                continue
            if key == "$ref" and isinstance(each, str):
                if name := definition(each):
                    kept[key] = f"#/$defs/{name}"
                continue
            kept[key] = copy_of(each, key in _DATA)
        return kept

    def definition(reference: str) -> str:
        if reference not in names:
            found = _target(schema, reference)
            names[reference] = "" if found is None else f"part{len(parts)}"
            if found is not None:
                parts[names[reference]] = {}  # it may refer to itself
                parts[names[reference]] = copy_of(found)
        return names[reference]

    main = copy_of(schema)
    return main, parts


def _target(root: Schema, reference: str) -> Schema | bool | None:
    """The schema that a reference within the document leads to, if any."""
    path = reference.removeprefix("#")
    if not reference.startswith("#"):
        return None
    if path and not path.startswith("/"):
        return next((found for found in objects_in(root) if found.get("$anchor") == path), None)
    found = at_pointer(root, path)
    return found if isinstance(found, dict | bool) else None
