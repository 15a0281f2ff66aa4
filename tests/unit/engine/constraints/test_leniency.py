"""The part of a lenient schema that is kept, with a compiler that refuses given texts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from engine.constraints.leniency import compilable_part

Schema = dict[str, Any]


def refuses(*parts: str) -> Callable[[Schema], bool]:
    """A compiler that refuses every schema that contains all of these texts."""

    def compiles(schema: Schema) -> bool:
        return not all(part in json.dumps(schema) for part in parts)

    return compiles


OBJECT = {"type": "object"}
CASES: list[tuple[str, Schema, tuple[str, ...], Schema]] = [
    (
        "a keyword",
        {**OBJECT, "properties": {"a": {"pattern": "bad", "maxLength": 3}, "b": {"const": 1}}},
        ("bad",),
        {**OBJECT, "properties": {"a": {"maxLength": 3}, "b": {"const": 1}}},
    ),
    (
        "two that do not go together",
        {**OBJECT, "properties": {"a": {"maxLength": 3, "type": "string", "pattern": "x"}}},
        ("pattern", "maxLength"),
        {**OBJECT, "properties": {"a": {"maxLength": 3, "type": "string"}}},
    ),
    (
        "one of several patterns",
        {**OBJECT, "patternProperties": {"a": {"type": "null"}, "b": {}}},
        ('"a"', '"b"'),
        {**OBJECT, "patternProperties": {"a": {"type": "null"}}},
    ),
    (
        "one of those that must all hold",
        {**OBJECT, "allOf": [{"const": 1}, {"bad": 2}], "required": ["a", 5, "b"]},
        ("5",),
        {**OBJECT, "allOf": [{"const": 1}, {"bad": 2}], "required": ["a", "b"]},
    ),
    ("a branch", {"anyOf": [{"x": 1}, {"bad": 2}]}, ("bad",), {"anyOf": [{"x": 1}, {}]}),
    (
        "deep in lists",
        {"items": [{"prefixItems": [{"a": {"bad": 1}}, {"b": 2}]}]},
        ("bad",),
        {"items": [{"prefixItems": [{}, {"b": 2}]}]},
    ),
    (
        "no schema",
        {"properties": {"a": [1], "b": True}},
        ("[1]",),
        {"properties": {"a": {}, "b": True}},
    ),
    ("no map", {"properties": None, "type": "object"}, ("null",), OBJECT),
    ("nothing", {"bad": 1}, ("{",), {}),
    (
        "references that lead nowhere",
        {
            "properties": {
                "a": {"$ref": "#/$defs/none"},
                "b": {"$ref": "elsewhere.json", "title": "bad"},
                "c": {"$ref": "#/properties/b"},
                "d": {"$ref": "#/$defs/a~1b%25"},
                "e": {"$ref": "#here"},
            },
            "$defs": {"a/b%": {"const": 1}, "x": {"$anchor": "here", "const": 2}},
        },
        ("bad",),
        {
            "properties": {
                "a": {},
                "b": {},
                "c": {"$ref": "#/$defs/part0"},
                "d": {"$ref": "#/$defs/part1"},
                "e": {"$ref": "#/$defs/part2"},
            },
            "$defs": {
                "part0": {},
                "part1": {"const": 1},
                "part2": {"$anchor": "here", "const": 2},
            },
        },
    ),
    (
        "a reference to the whole",
        {"properties": {"a": {"$ref": "#"}, "b": {"bad": 1, "const": {"$ref": "#/no"}}}},
        ("bad",),
        {
            "properties": {"a": {"$ref": "#/$defs/part0"}, "b": {"const": {"$ref": "#/no"}}},
            "$defs": {
                "part0": {
                    "properties": {
                        "a": {"$ref": "#/$defs/part0"},
                        "b": {"const": {"$ref": "#/no"}},
                    }
                }
            },
        },
    ),
    (
        "definitions that do not go together",
        {
            "properties": {"a": {"$ref": "#/$defs/a"}, "b": {"$ref": "#/$defs/b"}},
            "$defs": {"a": {"const": "first"}, "b": {"const": "second", "title": "kept"}},
        },
        ("first", "second"),
        {
            "properties": {"a": {"$ref": "#/$defs/part0"}, "b": {"$ref": "#/$defs/part1"}},
            "$defs": {"part0": {"const": "first"}, "part1": {"title": "kept"}},
        },
    ),
]


@pytest.mark.parametrize(
    ("schema", "refused", "left"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_only_the_smallest_parts_are_lost(
    schema: Schema, refused: tuple[str, ...], left: Schema
) -> None:
    before = json.dumps(schema)
    assert json.dumps(compilable_part(schema, refuses(*refused))) == json.dumps(left)
    assert json.dumps(schema) == before


def test_too_many_compilations_give_any_object() -> None:
    tries = 0

    def compiles(schema: Schema) -> bool:
        nonlocal tries
        tries += 1
        return False

    wide = {"properties": {f"p{i}": {"type": "string"} for i in range(1000)}}
    assert compilable_part(wide, compiles) == OBJECT
    assert tries <= 400
    tries = 0
    assert (
        compilable_part(wide, compiles, time.thread_time() - 60) == OBJECT
    )  # compiling it took long
    assert not tries
    depth: Schema = {}
    for _ in range(3000):
        depth = {"items": depth}
    assert compilable_part(depth, refuses("nothing of this")) == OBJECT
