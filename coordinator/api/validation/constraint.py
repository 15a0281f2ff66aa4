"""The door for constraints: the ways to say one -> a kind and a source. Pure, and quick.

Whether it can be used at all only a compilation tells (`Pipeline`, in threads).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from engine.base.errors import InvalidRequest
from engine.base.types import Constraint, ConstraintKind
from engine.constraints.grammar import MAX_SOURCE_CHARS
from engine.pb.diptych.v1 import inference_pb2

MAX_CHOICES = 1000
# A regex of n parts may take n squared to compile.
MAX_REGEX_CHARS = 16 << 10
MAX_GRAMMAR_CHARS = 64 << 10
_ANY_OBJECT = Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "object"}')


def constraint_from(asked: inference_pb2.Constraint) -> Constraint | None:
    """What the answer must be; None: anything. Raises InvalidRequest."""
    match asked.WhichOneof("kind"):
        case "json_schema":
            source = _checked("json_schema", asked.json_schema, MAX_SOURCE_CHARS)
            return Constraint(ConstraintKind.JSON_SCHEMA, source)
        case "json_object":
            return _ANY_OBJECT if asked.json_object else None
        case "regex":
            source = _checked("regex", asked.regex, MAX_REGEX_CHARS)
            return Constraint(ConstraintKind.REGEX, source)
        case "grammar":
            source = _checked("grammar", asked.grammar, MAX_GRAMMAR_CHARS)
            return Constraint(ConstraintKind.LARK, source)
        case "choice":
            return Constraint(ConstraintKind.LARK, _one_of(asked.choice.choices))
    return None


def _checked(kind: str, source: str, most: int) -> str:
    if not source.strip():
        raise InvalidRequest(f"constraint.{kind}", "empty")
    if len(source) > most:
        raise InvalidRequest(
            f"constraint.{kind}", f"{len(source)} characters; expected at most {most}"
        )
    return source


def _one_of(texts: Sequence[str]) -> str:
    """A grammar of just these texts."""
    field = "constraint.choice.choices"
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise InvalidRequest(field, f"{len(texts)} choices; expected 1 to {MAX_CHOICES}")
    for i, text in enumerate(texts):
        if not text:
            raise InvalidRequest(f"{field}[{i}]", "empty; expected text")
    if (num_chars := sum(map(len, texts))) > MAX_GRAMMAR_CHARS:
        raise InvalidRequest(field, f"{num_chars} characters; expected at most {MAX_GRAMMAR_CHARS}")
    return "start: " + " | ".join(map(json.dumps, texts))
