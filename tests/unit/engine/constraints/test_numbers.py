"""Outputs end although the model prefers white space, digits, zeros or exponents."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal

import numpy as np
import pytest
from llguidance import LLTokenizer

from coordinator.api import values
from coordinator.api.grpc.requests import read_request
from coordinator.api.validation.tools import check_tools, text_schema, tool_use
from coordinator.text.tools.format import ToolUse
from coordinator.text.tools.forms import FORMATS
from coordinator.text.tools.grammar import tool_grammar
from engine.base.types import Constraint, ConstraintKind
from engine.checkpoint.source import resolve
from engine.constraints import Compiler, Masks, Matcher, Vocabulary
from engine.constraints.masks import MaskRequest
from engine.constraints.numbers import MAX_DIGITS, NumberScanner, Part, json_after, step_of
from engine.pb.diptych.v1 import inference_pb2 as pb
from tests.support.paths import ROOT

VOCAB, END = 49152, 2
NUMBER = re.compile(r"-?([0-9]+)(?:\.([0-9]+))?(?:[eE][+-]?([0-9]+))?")


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(resolve("smollm2").folder, VOCAB, (END, 0))


@pytest.fixture(scope="module")
def tokens(vocabulary: Vocabulary) -> LLTokenizer:
    return vocabulary.build()


@pytest.fixture(scope="module")
def compiler(vocabulary: Vocabulary) -> Iterator[Compiler]:
    made = Compiler(vocabulary)
    yield made
    made.close()


def allowed(masks: Masks, matcher: Matcher, draft: list[int] | None = None) -> list[list[int]]:
    rows = masks.wait(masks.begin({0: MaskRequest(matcher, draft or [])}))[0]
    bits = np.unpackbits(rows.view(np.uint8), axis=1, bitorder="little")
    return [np.flatnonzero(row).tolist() for row in bits]


def written(matcher: Matcher, tokens: LLTokenizer, likes: str, maximum: int = 300) -> str:
    """The output of a model that prefers these characters, in this order, and the end last."""
    masks, text = Masks(VOCAB), b""
    order = [tokens.tokenize_str(char)[0] for char in likes]
    for _ in range(maximum):
        can = allowed(masks, matcher)[0]
        liked = [token for token in order if token in can]
        others = [token for token in can if token not in (END, 0)]
        if not liked and not others:
            break
        token = liked[0] if liked else min(others, key=lambda t: (len(tokens.decode_bytes([t])), t))
        assert matcher.advance([token]), matcher.error
        text += tokens.decode_bytes([token])
        if matcher.ended:
            break
    else:
        pytest.fail(f"no end: {text[:300]!r}")
    return text.decode()


NUMBERS: list[dict[str, object]] = [
    {"type": "number"},
    {"type": "integer"},
    {"type": ["number", "null"]},
    {"anyOf": [{"type": "number"}, {"const": 8.5}]},
    {"type": "integer", "minimum": 8},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0.5, "maximum": 9},
    {"type": "number", "exclusiveMaximum": -0.25},
    {"type": "number", "multipleOf": 0.01},
    {"type": "integer", "multipleOf": 7},
    {"type": "integer", "multipleOf": 1000},
    {"type": "integer", "multipleOf": 100000},
    *({"type": "integer", "multipleOf": step} for step in (1999, 3600, 86400)),
    {"type": "number", "multipleOf": 12.345},
    {"multipleOf": 1440, "type": "number", "minimum": 7},
    {"anyOf": [{"type": "integer", "multipleOf": 1999}, {"type": "integer", "multipleOf": 2003}]},
    {"allOf": [{"multipleOf": 30}, {"type": "integer", "minimum": 100}]},
]


@pytest.mark.parametrize("likes", ["8", "0", "9.e", "1.0", "e0-.8", "-0.8"])
@pytest.mark.parametrize("schema", NUMBERS, ids=lambda s: json.dumps(s)[:60])
async def test_numbers_come_to_an_end_within_their_bounds(
    compiler: Compiler, tokens: LLTokenizer, schema: dict[str, object], likes: str
) -> None:
    source = {"type": "array", "items": schema, "minItems": 1, "maxItems": 2}
    matcher = await compiler.matcher(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(source)))
    text = written(matcher, tokens, likes)
    for number in json.loads(text, parse_float=Decimal):
        assert number is not None
    for whole, fraction, exponent in NUMBER.findall(text):
        more = 7 if "multipleOf" in json.dumps(schema) else 0  # digits that lead to a multiple
        assert len(whole) <= MAX_DIGITS[Part.WHOLE] + more
        assert len(fraction) <= MAX_DIGITS[Part.FRACTION] + 1  # above an exclusive bound
        assert len(exponent) <= MAX_DIGITS[Part.EXPONENT]


@pytest.mark.parametrize("likes", [" ", "\n ", "\t\n", "\r\n\t", " \n8"])
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "items": {"type": "integer", "maximum": 3}, "maxItems": 3},
        {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": False},
        {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    ],
)
async def test_white_space_comes_to_an_end(
    compiler: Compiler, tokens: LLTokenizer, schema: dict[str, object], likes: str
) -> None:
    """A list in which the model prefers blanks."""
    matcher = await compiler.matcher(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema)))
    text = written(matcher, tokens, likes)
    json.loads(text)
    assert max(map(len, re.findall(r"\s+", text))) <= len("\r\n") + 40


LEGITIMATE = [
    *("0.30000000000000004", "1.7976931348623157e+308", "5e-324", "6.02214076e23", "-0.0"),
    *("9223372036854775807", "-9223372036854775808", "18446744073709551615", "1E400", "1e-007"),
    *(
        "0.00000012345678901234567",
        "123456789012.12345678901234567",
        "1e5",
        "100000000000000000000",
    ),
]


async def test_numbers_of_full_precision_are_allowed(
    compiler: Compiler, tokens: LLTokenizer
) -> None:
    matcher_of = Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "number"}')
    masks = Masks(VOCAB)
    for text in LEGITIMATE[:-1]:
        matcher = await compiler.matcher(matcher_of)
        for token in tokens.tokenize_str(text):
            assert token in allowed(masks, matcher)[0], text
            assert matcher.advance([token])
        assert END in allowed(masks, matcher)[0]
    matcher = await compiler.matcher(matcher_of)
    assert matcher.advance(tokens.tokenize_str("1" * 20))
    assert not [t for t in allowed(masks, matcher)[0] if tokens.decode_bytes([t])[:1].isdigit()]


@pytest.mark.parametrize(
    "value", [1e22, 123456789e14, 1 << 62, 0.1 + 0.75, 1234567890123456e-22, -12345678e-15]
)
async def test_constants_are_written_to_their_end(
    compiler: Compiler, tokens: LLTokenizer, value: float
) -> None:
    for schema in ({"const": value}, {"enum": [value, 7]}):
        matcher = await compiler.matcher(Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(schema)))
        text = written(matcher, tokens, "-0123456")
        if "const" in schema:
            assert Decimal(text) == Decimal(repr(value))


@pytest.mark.parametrize("step", [1, 7, 10, 1999, 86400, 10**6])
@pytest.mark.parametrize("digits", ["1", "98765432109876543210", "20000000000000000001"])
def test_a_number_becomes_a_multiple(step: int, digits: str) -> None:
    scanner = NumberScanner(step=step)
    scanner.feed(f"[7, -3.5, -{digits}".encode())
    for _ in range(len(str(step))):
        digits += str(scanner.next_digit_to_multiple)
        scanner.feed(digits[-1:].encode())
        if int(digits) % step == 0:
            return
    pytest.fail(digits)


STEPS = f"""
from engine.constraints.numbers import step_of
print(step_of("".join(f'"multipleOf": {{step}},' for step in (3e60, {7**18}, {11**15}))))
"""


def test_a_step_that_is_too_large_is_the_same_in_all_processes() -> None:
    """Each process orders texts in sets in another way; the masks of an answer must not depend."""
    steps = {
        subprocess.run(
            [sys.executable, "-c", STEPS],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in range(6)
    }
    assert len(steps) == 1


def test_the_step_of_a_schema_is_one_for_all_of_its_multiples() -> None:
    assert step_of('{"multipleOf":4, "items": {"multipleOf" : 6.0}}') == 12
    assert step_of('{"multipleOf": 12.345}') == 2469  # whole multiples of 2469/200
    assert step_of('{"multipleOf": 1e-7, "x": {"multipleOf": 1e999999999}}') == 1
    assert step_of('{"multipleOf": 0, "x": {"multipleOf": -5}}') == 1
    many = json.dumps([{"multipleOf": 2 * i + 100_001} for i in range(2000)])
    assert step_of(many).bit_length() <= 256


async def test_masks_are_a_function_of_the_tokens(compiler: Compiler, tokens: LLTokenizer) -> None:
    """After a draft as token by token, at the bound and beyond."""
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "array"}')
    given = tokens.tokenize_str('["8e8\\"8888888888888888888888", 8.' + "8" * 22)
    draft = tokens.tokenize_str("88888, 8")
    masks, matcher = Masks(VOCAB), await compiler.matcher(constraint, given)
    behind = allowed(masks, matcher, draft)
    for i in range(3):
        assert allowed(masks, matcher)[0] == behind[i]
        assert matcher.advance([draft[i]])
    assert draft[1] in behind[1]
    assert draft[2] not in behind[2]  # not allowed: the draft ends there


def scanned(text: str, trigger: str = "", cut: int = 1) -> tuple[Part, int]:
    scanner = NumberScanner(trigger)
    for i in range(0, len(text), cut):
        scanner.feed(text[i : i + cut].encode())
    return scanner.part, scanner.num_digits


@pytest.mark.parametrize("cut", [1, 2, 3, 100])
def test_only_numbers_are_counted(cut: int) -> None:
    for text, scanner in {
        "[12": (Part.WHOLE, 2),
        "[12, -3.45": (Part.FRACTION, 2),
        '{"a": 12E+045': (Part.EXPONENT, 3),
        '{"a\\"12': (Part.NONE, 0),
        '{"a\\\\": 1': (Part.WHOLE, 1),
        "[1.5, true": (Part.NONE, 0),
        "[1e5-": (Part.NONE, 0),
        '"é12': (Part.NONE, 0),
        "": (Part.NONE, 0),
    }.items():
        assert scanned(text, cut=cut) == scanner, text
    assert scanned("3.14 <tool", "<tool>", cut) == (Part.NONE, 0)
    assert scanned('3.14 "<tool>[1.25', "<tool>", cut) == (Part.FRACTION, 2)
    assert scanned("x[3", "[", cut) == (Part.WHOLE, 1)
    assert NumberScanner.of_lark("start: /.*/") is None
    marked = NumberScanner.of_lark(json_after('<"é">') + "start: /.*/")
    assert marked is not None
    marked.feed('12<"é">345'.encode())
    assert (marked.part, marked.num_digits) == (Part.WHOLE, 3)


def called(form_name: str, mode: int) -> ToolUse:
    parameters = {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "array", "maxItems": 2}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    function = {"name": "f", "parameters": parameters}
    tools = check_tools("t", json.dumps([{"type": "function", "function": function}]))
    request = pb.ChatRequest(tool_choice=pb.ToolChoice(mode=mode), parallel_tool_calls=False)
    found = tool_use(read_request(request), tools, FORMATS[form_name])
    assert found
    return found


UNMARKED = [name for name, form in FORMATS.items() if form.trigger and not form.text_begin]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("mode", [pb.ToolChoice.MODE_AUTO, pb.ToolChoice.MODE_REQUIRED])
async def test_arguments_of_calls_come_to_an_end(
    compiler: Compiler, tokens: LLTokenizer, name: str, mode: int
) -> None:
    use = called(name, mode)
    header = use.format.header.replace("{name}", "f")
    begin = header + use.format.write([("f", '{"a": 7}')]).rpartition("7")[0]
    for text in ("", "3.1415926535897932384626433832795 "):
        is_free = use.format.trigger and not use.format.text_begin
        if text and (mode == pb.ToolChoice.MODE_REQUIRED or not is_free):
            continue
        matcher = await compiler.matcher(tool_grammar(use), tokens.tokenize_str(text + begin))
        rest = written(matcher, tokens, "8")
        bounds = (24,) if use.format.body.is_json else (20, 24)  # others may end at once
        assert max(map(len, re.findall("8+", rest))) in bounds
    if mode == pb.ToolChoice.MODE_AUTO and not use.format.text_begin:  # text is unconstrained
        matcher = await compiler.matcher(tool_grammar(use), tokens.tokenize_str("x " + "8" * 40))
        assert tokens.tokenize_str("8")[0] in allowed(Masks(VOCAB), matcher)[0]


@pytest.mark.parametrize("name", UNMARKED)
async def test_json_beside_calls_comes_to_an_end(
    compiler: Compiler, tokens: LLTokenizer, name: str
) -> None:
    """Text with a schema: a number alone, and one in a list."""
    use = called(name, pb.ToolChoice.MODE_AUTO)
    for schema in ({"type": "number"}, {"type": "array", "items": {"type": "number"}}):
        constraint = values.Constraint("json_schema", json.dumps(schema))
        grammar = tool_grammar(use, text_schema(constraint, use))
        opening = "[" if "items" in schema else ""
        matcher = await compiler.matcher(grammar, tokens.tokenize_str(opening))
        text = written(matcher, tokens, "8 \n]")
        assert max(map(len, re.findall("8+", text))) in (20, 24)
        json.loads(opening + text)


async def test_other_constraints_are_unchanged(compiler: Compiler, tokens: LLTokenizer) -> None:
    digit = tokens.tokenize_str("8")[0]
    for kind, source in (
        (ConstraintKind.REGEX, "[0-9]+"),
        (ConstraintKind.LARK, "start: /[0-9]+/"),
    ):
        matcher = await compiler.matcher(Constraint(kind, source), [digit] * 60)
        assert digit in allowed(Masks(VOCAB), matcher)[0]
