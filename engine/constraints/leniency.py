"""What of a lenient schema can be compiled: all but the smallest parts that cannot.

schemas.py leaves out what it knows; the rest only a compilation shows, so this one tries:

    schema --flattened--> a main part and definitions, whose references lead to definitions alone
           each of them by itself, with definitions that allow anything in place of the others:
               a part inside that does not compile is mended first, from the innermost out,
               then the keywords beside each other: those that compile together stay
           all of them together; where that fails, the definitions that do not fit are let go

The number of compilations and their time are bounded; beyond, arguments are any JSON object. But
for that time the same schema gives the same one everywhere, so that a second coordinator goes on
with an answer of the first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, cast
from urllib.parse import unquote

_MOST_TRIES = 400
_MOST_CPU_S = 1.0  # well below what a try may take: see checker.py
_MAPS = frozenset(("properties", "patternProperties", "dependentSchemas"))
_LISTS = frozenset(("anyOf", "oneOf", "allOf", "prefixItems", "items"))
_SINGLE = frozenset(("items", "additionalProperties", "additionalItems"))
_ALL_HOLD = frozenset(("allOf", "required"))
_DATA = frozenset(("const", "enum", "default", "examples"))
# What says most is kept first where not all can be.
_ORDER = ("type", "properties", "required", "items", "$ref", "enum", "const", "anyOf", "oneOf")
Schema = dict[str, Any]
Compiles = Callable[[Schema], bool]


class _Spent(Exception):
    """Too many compilations."""


def loosened(schema: Schema, compiles: Compiles, begun_s: float | None = None) -> Schema:
    """The part of an object's schema that compiles; it takes all that the schema takes.

    `begun_s`: since when time of this thread was spent on it.
    """
    left = _MOST_TRIES
    until_s = (time.thread_time() if begun_s is None else begun_s) + _MOST_CPU_S

    def tries(part: Schema) -> bool:
        nonlocal left
        left -= 1
        if left < 0 or time.thread_time() > until_s:
            raise _Spent
        return compiles(part)

    try:
        return _loosened(schema, tries)
    except (_Spent, RecursionError):
        return {"type": "object"}


def _loosened(schema: Schema, compiles: Compiles) -> Schema:
    main, parts = _flattened(schema)
    anything: Schema = {name: {} for name in parts}

    def alone(part: Schema) -> bool:
        return compiles({**part, "$defs": anything} if anything else part)

    main = _mended(main, alone)
    parts = {name: _mended(part, alone) for name, part in parts.items()}
    whole = {**main, "$defs": parts} if parts else main
    if not parts or compiles(whole):
        return whole
    kept = dict(anything)
    for name, part in parts.items():

        def among(some: Schema, name: str = name) -> bool:
            return compiles({**main, "$defs": {**kept, name: some}})

        kept[name] = _mended(part, among)
    return {**main, "$defs": kept}


def _mended(schema: Any, compiles: Compiles) -> Any:
    """The part of one schema that compiles; {} if none does."""
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
        elif (fewer := _fewer(key, inner[key], fits)) is not None:
            kept[key] = fewer
    return _in_order(kept, inner)


def _fewer(key: str, value: Any, fits: Callable[[Any], bool]) -> Any:
    """Those entries of a keyword that compile together, where fewer of them allow more; or None."""
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
    """The order of keywords is that in which members come."""
    return {key: some[key] for key in all_ if key in some}


def _inside(key: str, value: Any, compiles: Compiles) -> Any:
    if key in _MAPS and isinstance(value, dict):
        return {name: _mended(each, compiles) for name, each in value.items()}
    if key in _LISTS and isinstance(value, list):
        return [_mended(each, compiles) for each in value]
    if key in _SINGLE and isinstance(value, dict):
        return _mended(value, compiles)
    return value


def _flattened(schema: Schema) -> tuple[Schema, dict[str, Any]]:
    """The main part and what its references lead to; those that lead nowhere are left out."""
    names: dict[str, str] = {}
    parts: dict[str, Any] = {}

    def copied(value: Any, is_data: bool = False) -> Any:
        if isinstance(value, list):
            return [copied(each, is_data) for each in value]
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
            kept[key] = copied(each, key in _DATA)
        return kept

    def definition(reference: str) -> str:
        if reference not in names:
            found = list(_target(schema, reference))
            names[reference] = f"part{len(parts)}" if found else ""
            if found:
                parts[names[reference]] = {}  # it may refer to itself
                parts[names[reference]] = copied(found[0])
        return names[reference]

    main = copied(schema)
    return main, parts


def _target(root: Schema, reference: str) -> Iterator[Any]:
    """The schema of a reference within the document, if there is one."""
    path, found = reference.removeprefix("#"), cast(Any, root)
    if not reference.startswith("#") or (path and not path.startswith("/")):
        anchored = [s for s in _schemas(root) if path and s.get("$anchor") == path]
        yield from anchored[:1] if reference.startswith("#") else ()
        return
    for step in unquote(path).split("/")[1:]:
        name: Any = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal():
            name = int(name)
        try:
            found = found[name]
        except (KeyError, IndexError, TypeError):
            return
    if isinstance(found, dict | bool):
        yield found


def _schemas(value: Any) -> Iterator[Schema]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _schemas(each)
