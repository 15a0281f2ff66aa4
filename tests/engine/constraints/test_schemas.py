"""What llguidance by itself would take and not hold: mended, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from engine.checkpoint.source import resolve
from engine.constraints import Compiler, Vocabulary
from engine.constraints.schemas import MOST_OPTIONAL, Refused, held
from engine.types import Constraint, ConstraintKind

VOCAB = 49152
EXACT = 1 << 53


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(resolve("smollm2", progress=False).folder, VOCAB, (2, 0))


@pytest.fixture(scope="module")
def encode(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    return vocabulary.build().tokenize_str


@pytest.fixture(scope="module")
def compiler(vocabulary: Vocabulary) -> Iterator[Compiler]:
    made = Compiler(vocabulary)
    yield made
    made.close()


# schema, texts that it allows, texts that it does not
HELD = [
    (
        {"properties": {"foo": {"type": "integer"}}},
        ['{"foo": 1}', '{"foo": 1, "bar": "x"}', '{"a\\nb\\"": 1}'],
        ['{"\\u0066oo": "x"}', '{"foo": 1, "f\\u006fo": "x"}'],
    ),
    (
        {"patternProperties": {"^f": {"type": "integer"}}},
        ['{"f": 1}', '{"g": "x"}'],
        ['{"\\u0066": "x"}', '{"f": "x"}'],
    ),
    (
        {"properties": {"a\u0001b": {"type": "integer"}}, "type": "object"},
        ['{"a\\u0001b": 1}'],
        ['{"a\\u0001b": "x"}', '{"ab\\u0001": 1}'],
    ),
    ({"type": "integer", "minimum": EXACT + 1}, [str(EXACT + 2)], [str(EXACT), str(EXACT - 1)]),
    ({"type": "integer", "maximum": -EXACT - 1}, [str(-EXACT - 2)], [str(-EXACT)]),
    ({"type": "integer", "exclusiveMinimum": EXACT}, [str(EXACT + 4)], [str(EXACT)]),
    ({"type": "integer", "exclusiveMaximum": -EXACT}, [str(-EXACT - 4)], [str(-EXACT)]),
    (
        {"type": "integer", "minimum": EXACT, "exclusiveMinimum": True},
        [str(EXACT + 4)],
        [str(EXACT)],
    ),
    ({"type": "integer", "maximum": (1 << 63) - 1}, [str(EXACT), "-1"], [str(1 << 63)]),
    ({"const": EXACT}, [str(EXACT)], [str(EXACT + 1)]),
    (
        {"type": "object", "required": ["a"], "minProperties": 2},
        ['{"a": 1, "b": 1}'],
        ['{"a": 1}', '{"b": 1, "b": 1}'],
    ),
    (
        {"type": "array", "uniqueItems": False, "maxItems": 2.0, "minContains": 2},
        ["[1, 1]"],
        ["[1, 1, 1]"],
    ),
    (
        {"properties": {"then": {"type": "null"}, "uniqueItems": {"type": "null"}}},
        ['{"then": null, "uniqueItems": null}'],
        ['{"then": 1}', '{"uniqueItems": false}'],
    ),
    ({"pattern": "^[^\\x00-\\x1f]b$", "type": "string"}, ['"ab"'], ['"b"', '"\\nb"']),
    (True, ["1", '{"a": [null]}'], ["{]", "nul"]),
    (
        {"type": "array", "x-guidance": {"whitespace_flexible": False, "item_separator": ", "}},
        ["[1, 2]"],
        ["[1,2]", "[ 1, 2]"],
    ),
]


@pytest.mark.parametrize(("schema", "good", "bad"), HELD, ids=[str(s)[:60] for s, _, _ in HELD])
async def test_it_allows_what_is_valid(
    compiler: Compiler,
    encode: Callable[[str], list[int]],
    schema: object,
    good: list[str],
    bad: list[str],
) -> None:
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema))
    for text, fits in [*((t, True) for t in good), *((t, False) for t in bad)]:
        matcher = await compiler.matcher(constraint)
        assert (matcher.advance(encode(text)) and matcher.advance([2])) is fits, text


REFUSED = [
    ({"const": "a\u0001b"}, "const: character U+0001"),
    ({"properties": {"a": {"enum": [{"b": ["\u007f"]}]}}}, "enum: character U+007F"),
    ({"pattern": "^a\\x01b$"}, "pattern: control character"),
    ({"pattern": "^a[\\x01]b$"}, "pattern: control character"),
    ({"pattern": "\\[^\\x01]"}, "pattern: control character"),
    ({"pattern": "\u0001"}, "pattern: control character"),
    ({"patternProperties": {"\\cA": {}}}, "patternProperties: control character"),
    ({"const": EXACT + 1}, "const: 9007199254740993 has too many digits"),
    ({"enum": [1, {"a": [EXACT + 1]}]}, "enum: 9007199254740993"),
    ({"const": 1 << 63}, "const: 9223372036854775808"),
    ({"const": 1000000000000000.5}, "too many digits"),
    ({"maximum": 0.12345678901234567}, "maximum: 0.12345678901234566 has too many digits"),
    ({"maximum": 10**400}, "maximum: too large"),
    ({"items": {"properties": {f"p{i}": {} for i in range(161)}}}, "properties: 483 to choose"),
    ({"properties": {f"p{i}": {"type": "null"} for i in range(481)}}, "properties: 481 to choose"),
    ({"minProperties": 2}, "minProperties: 2, but only 1"),
    ({"anyOf": [{"minProperties": 3, "properties": {"a": {}}}]}, "minProperties: 3, but only 2"),
    ({"x-guidance": {"lenient": True}, "not": {}}, "x-guidance.lenient: not served"),
    ({"x-guidance": {"item_separator": ";"}}, "x-guidance.item_separator: not served"),
    ({"x-guidance": 1}, "x-guidance: expected an object"),
    ({"$schema": "http://json-schema.org/draft-03/schema#"}, "draft-03 is not served"),
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED, ids=[r for _, r in REFUSED])
def test_what_cannot_be_held_is_refused(schema: object, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        held(json.dumps(schema))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": "\\\\x01|[\\x01-\\x08]|\\n\\t"},
        {"const": "a\tb\n\r\b\f"},
        {"properties": {"minimum": {"type": "integer"}, "const": {"const": 1}}},
        {"minProperties": 3, "additionalProperties": False, "properties": {"a": {}}},
        {"minimum": -0.1, "maximum": 1e17, "multipleOf": 0.01},
        {"default": EXACT + 1, "examples": [{"uniqueItems": False}]},
    ],
)
def test_the_rest_stays_as_it_is(schema: dict[str, object]) -> None:
    now = json.loads(held(json.dumps(schema)))
    assert now.pop("x-guidance") == {"json_allowed_escapes": 'nrbtf\\"'}
    assert now == schema


@pytest.mark.parametrize(
    ("number", "schema"), [(MOST_OPTIONAL, {"type": "string"}), (MOST_OPTIONAL // 3, True)]
)
async def test_an_object_of_many_members_gets_to_its_end(
    compiler: Compiler, encode: Callable[[str], list[int]], number: int, schema: object
) -> None:
    object_ = {"type": "object", "properties": {f"the member {i}": schema for i in range(number)}}
    matcher = await compiler.matcher(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(object_)))
    for token in encode(f'{{"the member 7": "x", "the member {number - 1}": "y", "z": [1, {{}}]}}'):
        matcher.library.compute_bitmask()
        assert matcher.advance([token]), matcher.error
    assert matcher.error == ""
    assert matcher.library.is_accepting()


def test_members_that_must_be_there_are_no_choice() -> None:
    names = [f"p{i}" for i in range(1000)]
    schema = {"properties": {n: {"type": "null"} for n in names}, "required": names[::400]}
    assert held(json.dumps(schema))


def test_idle_keywords_are_left_out_anywhere() -> None:
    schema = {
        "$defs": {"uniqueItems": {"uniqueItems": False}},
        "foo": [{"maxContains": 2}],
        "items": {"unevaluatedItems": True, "contains": {}, "minContains": 1},
    }
    now = json.loads(held(json.dumps(schema)))
    now.pop("x-guidance")
    assert now == {
        "$defs": {"uniqueItems": {}},
        "foo": [{}],
        "items": {"contains": {}, "minContains": 1},
    }


@pytest.mark.parametrize(
    ("named", "is_read_as"),
    [
        ("https://json-schema.org/draft-07/schema#", "http://json-schema.org/draft-07/schema"),
        ("http://json-schema.org/draft-04/schema", "http://json-schema.org/draft-04/schema"),
        (
            "http://json-schema.org/draft/2020-12/schema",
            "https://json-schema.org/draft/2020-12/schema",
        ),
        ("http://example.com/mine", "http://example.com/mine"),
    ],
)
def test_drafts_by_any_of_their_names(named: str, is_read_as: str) -> None:
    assert json.loads(held(json.dumps({"$schema": named})))["$schema"] == is_read_as
