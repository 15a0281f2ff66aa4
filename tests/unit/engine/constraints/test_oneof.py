"""Branches of `oneOf` are told apart only where no value fits two of them."""

from __future__ import annotations

import itertools
import json
import random
import time

import pytest
from jsonschema import Draft202012Validator

from engine.constraints.oneof import Branches
from engine.constraints.schemas import held


def animal(kind: object, **more: object) -> dict[str, object]:
    return {"type": "object", "properties": {"kind": kind}, "required": ["kind"], **more}


CAT, DOG = animal({"const": "cat"}), animal({"enum": ["dog", "hound"]})
A, B = ({"required": [n], "properties": {n: {}}, "additionalProperties": False} for n in "ab")
APART = [
    [{"type": "string"}, {"type": ["integer", "null"]}, {"type": "array"}],
    [{"const": 1}, {"const": 2}, {"type": "string"}, {"enum": [None, True]}],
    [{"enum": [1.5, 2.5]}, {"type": "integer"}],
    [CAT, DOG],
    [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
    [{"$ref": "#/$defs/cat"}, {"allOf": [{"$ref": "#/$defs/dog"}]}, {"type": "null"}],
    [{"$ref": "#/$defs/cat"}, {"anyOf": [{"$ref": "#/$defs/dog"}, {"type": "string"}]}],
    [animal({"$ref": "#/$defs/a~1b%25"}), DOG],
    [CAT, {"properties": {"kind": {"const": "dog"}}, "type": "object"}],
    [{**A, "type": "object"}, {**B, "type": "object"}],
    [animal(CAT), animal(DOG)],
]
DEFS = {"cat": CAT, "dog": DOG, "a/b%": {"const": 7}, "loop": {"$ref": "#/$defs/loop"}}
NOT_SURE = [
    [{"type": "integer"}, {"type": "number"}],
    [{"const": 1}, {"enum": [2, 1.0]}],
    [{"required": ["a"]}, {"required": ["b"]}],
    [A, B],  # strings fit both
    [CAT, {**DOG, "required": [], "type": ["object", "string"]}, CAT],
    [{"properties": CAT["properties"]}, {"properties": DOG["properties"]}],
    [{"$ref": "#/$defs/loop"}, {"type": "null"}],
    [{"$ref": "https://example.com/cat"}, {"type": "null"}],
    [{"$ref": "#/$defs/none/at/all"}, {"type": "null"}],
    [{"$ref": "#/$defs/cat", "type": "string"}, DOG | {"required": []}, True],
    [{"const": {"a": 1}}, {"const": {"a": 2}}],
    [True, {"type": "string"}],
    [{"type": "nonsense"}, {"type": "string"}],
]


def tells_apart(options: list[object], **beside: object) -> bool:
    root: dict[str, object] = {"oneOf": options, "$defs": DEFS, **beside}
    return Branches(root).exclude_each_other(options, root)


@pytest.mark.parametrize("options", APART, ids=[str(o)[:70] for o in APART])
def test_apart(options: list[object]) -> None:
    assert tells_apart(options)
    now = json.loads(held(json.dumps({"items": {"oneOf": options}, "$defs": DEFS})))
    assert now["items"] == {"anyOf": options}


@pytest.mark.parametrize("options", NOT_SURE, ids=[str(o)[:70] for o in NOT_SURE])
def test_not_sure(options: list[object]) -> None:
    assert not tells_apart(options)
    now = json.loads(held(json.dumps({"oneOf": options, "$defs": DEFS})))
    assert now["oneOf"] == options


def test_what_stands_beside_counts_for_each() -> None:
    options = [{"properties": {"kind": {"const": kind}}} for kind in "ab"]
    assert not tells_apart(options)
    assert not tells_apart(options, type="object")
    assert tells_apart(options, type="object", required=["kind"])


def test_references_that_belong_elsewhere_are_not_followed() -> None:
    options = [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}]
    assert tells_apart(options, **{"$id": "https://example.com/animals"})
    assert not tells_apart(options, properties={"a": {"$id": "other", "$ref": "#/$defs/x"}})
    schema = {"oneOf": options, "$defs": DEFS, "properties": {"a": {"$ref": "#/oneOf/0"}}}
    assert "oneOf" in json.loads(held(json.dumps(schema)))


def test_draft_4_knows_no_const() -> None:
    schema = {"$schema": "http://json-schema.org/draft-04/schema#", "type": "object"}
    for kinds, known in (
        ([{"const": "a"}, {"const": "b"}], False),
        ([{"enum": ["a"]}, {"enum": ["b"]}], True),
    ):
        options = [animal(kind) for kind in kinds]
        now = json.loads(held(json.dumps({**schema, "oneOf": options})))
        assert ("anyOf" in now) is known


def test_a_document_takes_only_so_long() -> None:
    wide = {"enum": [f"{i}" for i in range(5000)]}
    options = [animal({**wide, "title": f"{i}"}) for i in range(300)]
    twice = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    deep = {"$ref": "#/$defs/d0"}
    begun = time.process_time()
    assert not tells_apart(options)
    assert not tells_apart([deep, deep], **{"$defs": twice})
    assert time.process_time() - begun < 3


VALUES = [None, True, False, 0, 1, 1.0, 1.5, "a", "b", [], [1], {}]
VALUES += [
    dict(zip(n, v, strict=True))
    for n in ("a", "ab")
    for v in itertools.product([0, "a", None], repeat=len(n))
]


def some_schema(rng: random.Random, depth: int) -> object:
    def values() -> list[object]:
        return [rng.choice(VALUES[:9]) for _ in range(rng.randrange(1, 3))]

    schema: dict[str, object] = {}
    if rng.random() < 0.6:
        names = rng.sample(["null", "boolean", "integer", "number", "string", "array", "object"], 2)
        schema["type"] = rng.choice([names, names[0], "object", "object"])
    if rng.random() < 0.3:
        schema |= rng.choice([{"const": values()[0]}, {"enum": values()}])
    if depth == 0:
        return schema
    inner = [some_schema(rng, depth - 1) for _ in range(2)]
    if rng.random() < 0.5:
        schema |= {"required": rng.sample("ab", 1), "properties": {"a": inner[0], "b": inner[1]}}
        if rng.random() < 0.3:
            schema["properties"] = {"a": inner[0]}
            schema["additionalProperties"] = False
    if rng.random() < 0.4:
        schema[rng.choice(["anyOf", "oneOf", "allOf"])] = inner
    return rng.choice([schema, schema, schema, {"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/one"}])


def test_no_value_fits_two_that_are_told_apart() -> None:
    rng = random.Random(5)
    num_apart = 0
    for _ in range(800):
        options = [some_schema(rng, 2), some_schema(rng, 2)]
        root = {"oneOf": options, "$defs": {**DEFS, "one": some_schema(rng, 1)}}
        if "#/$defs/one" in json.dumps(root["$defs"]) or not Branches(root).exclude_each_other(
            options, {}
        ):
            continue
        num_apart += 1
        sides = [Draft202012Validator({**root, "oneOf": [each]}) for each in options]
        for value in VALUES:
            assert not all(side.is_valid(value) for side in sides), (options, value)
    assert num_apart > 80
