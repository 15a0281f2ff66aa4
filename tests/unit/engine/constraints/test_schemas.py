"""What llguidance accepts but does not enforce is rewritten, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from engine.base.types import Constraint, ConstraintKind
from engine.checkpoint.source import resolve
from engine.constraints import Compiler, Vocabulary
from engine.constraints.bounds import MAX_OPTIONAL
from engine.constraints.schema_context import Leniency, UnsupportedSchema
from engine.constraints.schemas import FORMATS, WHITE_SPACE, prepare_schema

VOCAB = 49152
EXACT = 1 << 53


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(resolve("smollm2").folder, VOCAB, (2, 0))


@pytest.fixture(scope="module")
def encode(vocabulary: Vocabulary) -> Callable[[str], list[int]]:
    return vocabulary.build().tokenize_str


@pytest.fixture(scope="module")
def compiler(vocabulary: Vocabulary) -> Iterator[Compiler]:
    made = Compiler(vocabulary)
    yield made
    made.close()


# schema, texts that it allows, texts that it forbids
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
    ({"const": "a\u0001b\u007f"}, ['"a\\u0001b\\u007f"'], ['"ab"', '"a b"', '"a\\nb"']),
    ({"enum": [["\u001f\u00e9\U0001f600"]]}, ['["\\u001fé😀"]'], ['["é😀"]']),
    ({"pattern": "^a\\x01b$", "type": "string"}, ['"a\\u0001b"'], ['"ab"']),
    ({"pattern": "^a[\\x01]b$", "type": "string"}, ['"a\\u0001b"'], ['"ab"']),
    ({"pattern": "^\\[\\x01]$", "type": "string"}, ['"[\\u0001]"'], ['"[]"']),
    ({"pattern": "^\u0001$", "type": "string"}, ['"\\u0001"'], ['""']),
    (
        {
            "properties": {"foo": {"const": "\u0001"}},
            "additionalProperties": False,
            "type": "object",
        },
        ['{"foo": "\\u0001"}'],
        ['{"\\u0066oo": 1}', '{"foo": "\\u0002"}', '{"foo": "", "foo": 1}'],
    ),
    (
        {"type": "array", "items": {"type": "integer"}},
        ["[1, 2]", "[\n  1,\n  2\n]", "[\r\n\t1]", "[  1 ]", "[\n" + " " * 40 + "1]"],
        ["[\n\n1]", "[   1]", "[\n" + " " * 41 + "1]", "[1" + "\t" * 3 + "]", "[1 \n]"],
    ),
    (
        {"type": "number", "multipleOf": 1000},
        ["9223372036854776000", "-10000000000000000000", "0"],
        ["9223372036854775807", "1e3"],
    ),
    (
        {"type": "number", "multipleOf": 0.01, "maximum": 1},
        ["0.99", "1", "-10000000000000000000.00"],
        ["1.01", "0.001"],
    ),
    *(
        ({"type": kind, "minimum": minimum, "maximum": maximum}, ["0", str(EXACT), "-1"], ['"a"'])
        for kind in ("integer", "number", ["integer", "null"])
        for minimum, maximum in ((-1 << 63, (1 << 63) - 1), (-1.7976931348623157e308, 1e30))
    ),
    ({"type": "integer", "minimum": -(10**400)}, ["0", "-1"], [str(-(1 << 63))]),
    ({"type": "integer", "exclusiveMaximum": 1 << 64, "minimum": 1}, ["7"], ["0"]),
    (
        {"type": "string", "format": "time", "minLength": 26},
        ['"08:16:48.12345678901+00:00"'],
        ['"08:16:48.123456789012+00:00"'],
    ),
    (
        {"type": "string", "format": "date-time"},
        ['"2026-11-30T08:16:48.123456789+00:00"', '"2026-11-30T08:16:48Z"'],
        ['"2026-11-30T08:16:48.12345678901+00:00"', '"2026-11-30"', '"x"'],
    ),
    ({"type": "string", "format": "colour", "maxLength": 2}, ['"ab"'], ['"abc"']),
    ({"title": "\ud800", "examples": ["\udc00"], "type": "null", "x": "\ud801"}, ["null"], ["1"]),
    (True, ["1", '{"a": [null]}'], ["{]", "nul"]),
    (
        {"type": "array", "x-guidance": {"whitespace_flexible": False, "item_separator": ", "}},
        ["[1, 2]"],
        ["[1,2]", "[ 1, 2]"],
    ),
]


@pytest.mark.parametrize(("schema", "good", "bad"), HELD, ids=[str(s)[:60] for s, _, _ in HELD])
async def test_a_prepared_schema_allows_what_is_valid(
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
    ({"properties": {"a": {"const": "b\u0001"}}}, "const: character U+0001"),
    ({"properties": {"a\nb": {"const": "a\u0001b"}}}, "const: character U+0001"),
    ({"required": ["a\u0001"], "enum": [{"b": ["\u007f"]}]}, "enum: character U+007F"),
    ({"properties": {"\t": {"pattern": "^a\\x01b$"}}}, "pattern: control character"),
    ({"const": "a\ud800"}, "const: character U+D800"),
    ({"enum": [{"\udfff": 1}]}, "enum: character U+DFFF"),
    ({"pattern": "\ud83d"}, "pattern: character U+D83D"),
    ({"properties": {"\ud83d": {}}}, "properties: character U+D83D"),
    ({"required": ["\ud83d"]}, "required: character U+D83D"),
    ({"patternProperties": {"\\cA": {}}}, "patternProperties: control character"),
    ({"const": EXACT + 1}, "const: 9007199254740993 has too many digits"),
    ({"enum": [1, {"a": [EXACT + 1]}]}, "enum: 9007199254740993"),
    ({"const": 1 << 63}, "const: 9223372036854775808"),
    ({"const": 1000000000000000.5}, "too many digits"),
    ({"maximum": 0.12345678901234567}, "maximum: 0.12345678901234566 has too many digits"),
    ({"minimum": 10**400}, "minimum: 1000"),
    ({"minimum": 1 << 63, "maximum": (1 << 64) - 1}, "minimum: 9223372036854775808"),
    ({"exclusiveMaximum": -1e19, "type": "number"}, "exclusiveMaximum: -1e+19"),
    ({"multipleOf": 999983}, "multipleOf: 999983 has too many digits"),
    ({"multipleOf": 0.999983, "type": ["integer", "null"]}, "multipleOf: 0.999983 has"),
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
def test_unsupported_schemas_are_refused(schema: object, reason: str) -> None:
    with pytest.raises(UnsupportedSchema) as caught:
        prepare_schema(json.dumps(schema))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": "\\\\x01|[\\x01-\\x08]|\\n\\t", "format": "email"},
        {"const": "a\tb\n\r\b\f"},
        {"properties": {"minimum": {"type": "integer"}, "const": {"const": 1}}},
        {"minProperties": 3, "additionalProperties": False, "properties": {"a": {}}},
        {"minimum": -0.1, "maximum": 1e17, "multipleOf": 10000},
        {"default": EXACT + 1, "examples": [{"uniqueItems": False}]},
    ],
)
def test_the_rest_is_unchanged(schema: dict[str, object]) -> None:
    now = json.loads(prepare_schema(json.dumps(schema)))
    options = now.pop("x-guidance")
    assert options == {"json_allowed_escapes": 'nrbtf\\"', "whitespace_pattern": WHITE_SPACE}
    assert now == schema


@pytest.mark.parametrize(
    ("number", "schema"), [(MAX_OPTIONAL, {"type": "string"}), (MAX_OPTIONAL // 3, True)]
)
async def test_an_object_of_many_members_ends(
    compiler: Compiler, encode: Callable[[str], list[int]], number: int, schema: object
) -> None:
    object_ = {"type": "object", "properties": {f"the member {i}": schema for i in range(number)}}
    matcher = await compiler.matcher(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(object_)))
    for token in encode(f'{{"the member 7": "x", "the member {number - 1}": "y", "z": [1, {{}}]}}'):
        matcher.library.compute_bitmask()
        assert matcher.advance([token]), matcher.error
    assert matcher.error == ""
    assert matcher.library.is_accepting()


def test_required_members_do_not_count_as_optional() -> None:
    names = [f"p{i}" for i in range(1000)]
    schema = {"properties": {n: {"type": "null"} for n in names}, "required": names[::400]}
    assert prepare_schema(json.dumps(schema))


def test_keywords_without_effect_are_dropped() -> None:
    schema = {
        "$defs": {"uniqueItems": {"uniqueItems": False}},
        "foo": [{"maxContains": 2}],
        "items": {"unevaluatedItems": True, "contains": {}, "minContains": 1},
    }
    now = json.loads(prepare_schema(json.dumps(schema)))
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
def test_a_draft_may_have_any_of_its_uris(named: str, is_read_as: str) -> None:
    assert json.loads(prepare_schema(json.dumps({"$schema": named})))["$schema"] == is_read_as


@pytest.mark.parametrize("name", sorted(FORMATS))
async def test_known_formats_are_those_of_llguidance(compiler: Compiler, name: str) -> None:
    schema = json.dumps({"type": "string", "format": name, "x-guidance": {}})
    await compiler.matcher(Constraint(ConstraintKind.LARK, f"start: %json {schema}"))


def test_an_unknown_format_is_refused_in_a_strict_schema() -> None:
    schema = json.dumps({"items": {"type": "string", "format": "colour"}})
    with pytest.raises(UnsupportedSchema, match="format: 'colour' is not known; known are date, "):
        prepare_schema(schema, Leniency.NONE)
    assert "colour" not in prepare_schema(schema) + prepare_schema(schema, Leniency.ALL)
    properties = {"properties": {"format": {"const": "colour"}}, "default": {"format": "colour"}}
    assert prepare_schema(json.dumps(properties), Leniency.NONE)


LEFT_OUT = [
    ({"const": "\ud800", "type": "string"}, {"type": "string"}),
    ({"enum": ["a", "\ud800", 1 << 60 | 1, {"b": "c"}]}, {"enum": ["a", {"b": "c"}]}),
    ({"enum": ["\ud800"]}, {}),
    (
        {"properties": {"\ud800": {}, "a": {}}, "required": ["\ud800", "a"]},
        {"properties": {"a": {}}, "required": ["a"]},
    ),
    ({"pattern": "\ud800", "maxLength": 3}, {"maxLength": 3}),
    ({"patternProperties": {"\\cA": {}, "^b": {}}}, {"patternProperties": {"^b": {}}}),
    ({"minimum": 10**400, "maximum": 1}, {"maximum": 1}),
    ({"multipleOf": 999983, "type": "number"}, {"type": "number"}),
    ({"multipleOf": 99.9983, "type": "number"},) * 2,
    ({"minProperties": 2, "maxProperties": 3}, {"maxProperties": 3}),
    ({"title": "a\ud800"}, {"title": "a\ufffd"}),
    (
        {
            "properties": {f"p{i}": {} for i in range(200)},
            "required": ["p199"],
            "additionalProperties": False,
        },
        {"properties": {f"p{i}": {} for i in [*range(160), 199]}, "required": ["p199"]},
    ),
]


@pytest.mark.parametrize(("schema", "left"), LEFT_OUT, ids=[str(s)[:60] for s, _ in LEFT_OUT])
def test_a_lenient_schema_loses_unsupported_parts(
    schema: dict[str, object], left: dict[str, object]
) -> None:
    now = json.loads(prepare_schema(json.dumps({"properties": {"x": schema}}), Leniency.ALL))
    assert now.pop("x-guidance")["lenient"] is True
    assert now["properties"]["x"] == left


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("a\u0001b", r'"a\u0001b"'),
        (["\u007f\n"], r'["\u007f\n"]'),
        ({"\u001f": "\u0000"}, r'{"\u001f": "\u0000"}'),
        ('\U0001f600\u2028"\\', '"\U0001f600\u2028\\"\\\\"'),
        (1e-22, "0.0000000000000000000001"),
        (-(1 << 62), "-4611686018427387904"),
    ],
)
async def test_a_lenient_constant_is_written_exactly(
    compiler: Compiler, encode: Callable[[str], list[int]], value: object, written: str
) -> None:
    """Also with additional names, where a strict schema is refused."""
    for way in ({"const": value}, {"enum": [value, "\ud800"]}):
        mended = prepare_schema(
            json.dumps({"type": "object", "properties": {"x": way}}), Leniency.ALL
        )
        source = Constraint(ConstraintKind.LARK, f"start: %json {mended}")
        for text, fits in ((written, True), ('"a b"', False), ("[]", False), ("1", False)):
            matcher = await compiler.matcher(source)
            taken = matcher.advance(encode(f'{{"x": {text}}}')) and matcher.advance([2])
            assert taken is fits, text
