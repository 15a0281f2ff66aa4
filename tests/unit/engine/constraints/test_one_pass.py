"""Scanners of client text take one pass: their time is linear in the length of the text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest

from engine.constraints import grammar, numbers, representable, special_tokens
from engine.constraints.schema_context import Leniency, UnsupportedSchema
from engine.constraints.schemas import prepare_schema


class _Tokenizer:
    def tokenize_str(self, text: str) -> list[int]:
        return [1]


def with_token_ids(text: str) -> object:
    return special_tokens.with_token_ids(text, _Tokenizer())  # type: ignore[arg-type]


SCANNERS = (grammar._with_ascii_classes, representable._control_in, with_token_ids, numbers.step_of)
PIECES = (
    *("[^", "[a-", "[^]", "[", "[a-[^", "[\\]", "\\[", "\\", "[^\\]", "[a-z-"),
    *('"', '"\\"', '\\"', "/\\/", "/", "/a", "<", "<a", "<a\n", '"a\n', "//"),
    *('"multipleOf"', '"multipleOf" ', '"multipleOf": 1', "1e", "\\x", "\\u00", "]", "-]"),
)
ENDS = ("", "\\", "]", "\n", '"', "/", ">")


def best_s(scan: Callable[[str], object], text: str) -> float:
    def once() -> float:
        begun_s = time.thread_time()
        scan(text)
        return time.thread_time() - begun_s

    return min(once() for _ in range(3))


@pytest.mark.parametrize("scan", SCANNERS)
@pytest.mark.parametrize("piece", PIECES)
def test_time_grows_with_the_text(scan: Callable[[str], object], piece: str) -> None:
    """Quadratic time would grow 16 times for four times the text."""
    for end in ENDS:
        short = best_s(scan, "a" + 2000 * piece + end)
        long = best_s(scan, "a" + 8000 * piece + end)
        assert long < 10 * short + 0.02, (piece, end)


def branches(num: int, common: object) -> object:
    """A oneOf whose branches share a large part and differ in one constant."""
    told = [{"required": ["a"], "properties": {"a": {"const": i}}} for i in range(num // 20)]
    one_of = [{"allOf": [{"$ref": "#/$defs/A"}, each]} for each in told]
    return {"$defs": {"A": common}, "oneOf": one_of}


SCHEMAS: dict[str, Callable[[int], object]] = {
    "required": lambda n: branches(n, {"required": [f"n{i}" for i in range(n)], "type": "object"}),
    "no names": lambda n: branches(200, {"required": [[0] * n, "a"], "type": "object"}),
    "types": lambda n: branches(n, {"type": ["object"] * n}),
    "parts": lambda n: branches(n, {"allOf": [{"type": "object"}] * n}),
    "reference": lambda n: branches(n, {"$ref": "#" + "/x" * n}),
    "options": lambda n: {"oneOf": [{"const": f"c{i}"} for i in range(n)]},
    "enums": lambda n: {
        "oneOf": [{"enum": [f"{i} {j}" for j in range(20)]} for i in range(n // 20)]
    },
    "members": lambda n: {"properties": {f"p{i}": {} for i in range(n)}},
    "pattern": lambda n: {"pattern": "[a-" * n},
    "multiples": lambda n: {"items": [{"multipleOf": 5**400 * i} for i in range(n // 20)]},
}


@pytest.mark.parametrize("shape", SCHEMAS)
def test_time_grows_with_the_schema(shape: str) -> None:
    def hold(source: str) -> None:
        prepare_schema(source, Leniency.ALL)

    short = best_s(hold, json.dumps(SCHEMAS[shape](2000)))
    long = best_s(hold, json.dumps(SCHEMAS[shape](8000)))
    assert long < 10 * short + 0.1


@pytest.mark.parametrize("step", [10**4000, -(10**400), 1e300])
def test_a_multiple_of_no_double_is_refused(step: float) -> None:
    source = json.dumps({"multipleOf": step})
    with pytest.raises(UnsupportedSchema, match="too many digits"):
        prepare_schema(source)
    assert "multipleOf" not in prepare_schema(source, Leniency.ALL)
