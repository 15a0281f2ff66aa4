"""Branches of `oneOf` count as disjoint only if no value fits two of them."""

from __future__ import annotations

import itertools
import json
import random
import time

import pytest
from jsonschema import Draft202012Validator

from engine.constraints.oneof import Branches
from engine.constraints.schemas import prepare_schema


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


def are_disjoint(options: list[object], **beside: object) -> bool:
    root: dict[str, object] = {"oneOf": options, "$defs": DEFS, **beside}
    return Branches(root).are_disjoint(options, root)


@pytest.mark.parametrize("options", APART, ids=[str(o)[:70] for o in APART])
def test_disjoint(options: list[object]) -> None:
    assert are_disjoint(options)
    now = json.loads(prepare_schema(json.dumps({"items": {"oneOf": options}, "$defs": DEFS})))
    assert now["items"] == {"anyOf": options}


@pytest.mark.parametrize("options", NOT_SURE, ids=[str(o)[:70] for o in NOT_SURE])
def test_not_proven_disjoint(options: list[object]) -> None:
    assert not are_disjoint(options)
    now = json.loads(prepare_schema(json.dumps({"oneOf": options, "$defs": DEFS})))
    assert now["oneOf"] == options


def test_keywords_beside_oneof_apply_to_each_branch() -> None:
    options = [{"properties": {"kind": {"const": kind}}} for kind in "ab"]
    assert not are_disjoint(options)
    assert not are_disjoint(options, type="object")
    assert are_disjoint(options, type="object", required=["kind"])


def test_references_to_other_resources_are_not_followed() -> None:
    options = [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}]
    assert are_disjoint(options, **{"$id": "https://example.com/animals"})
    assert not are_disjoint(options, properties={"a": {"$id": "other", "$ref": "#/$defs/x"}})
    schema = {"oneOf": options, "$defs": DEFS, "properties": {"a": {"$ref": "#/oneOf/0"}}}
    assert "oneOf" in json.loads(prepare_schema(json.dumps(schema)))


def test_draft_4_has_no_const() -> None:
    schema = {"$schema": "http://json-schema.org/draft-04/schema#", "type": "object"}
    for kinds, known in (
        ([{"const": "a"}, {"const": "b"}], False),
        ([{"enum": ["a"]}, {"enum": ["b"]}], True),
    ):
        options = [animal(kind) for kind in kinds]
        now = json.loads(prepare_schema(json.dumps({**schema, "oneOf": options})))
        assert ("anyOf" in now) is known


def test_the_search_is_bounded() -> None:
    wide = {"enum": [f"{i}" for i in range(5000)]}
    options = [animal({**wide, "title": f"{i}"}) for i in range(300)]
    twice = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    depth = {"$ref": "#/$defs/d0"}
    begun = time.process_time()
    assert not are_disjoint(options)
    assert not are_disjoint([depth, depth], **{"$defs": twice})
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


def test_no_value_fits_two_disjoint_branches() -> None:
    rng = random.Random(5)
    num_apart = 0
    for _ in range(800):
        options = [some_schema(rng, 2), some_schema(rng, 2)]
        root = {"oneOf": options, "$defs": {**DEFS, "one": some_schema(rng, 1)}}
        if "#/$defs/one" in json.dumps(root["$defs"]) or not Branches(root).are_disjoint(
            options, {}
        ):
            continue
        num_apart += 1
        sides = [Draft202012Validator({**root, "oneOf": [each]}) for each in options]
        for value in VALUES:
            assert not all(side.is_valid(value) for side in sides), (options, value)
    assert num_apart > 80
