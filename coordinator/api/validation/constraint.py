"""The check of constraints: a kind of the API -> a kind and a source. Pure, and quick.

Whether a constraint can be used at all, only a compilation shows (`Pipeline`, in threads).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from coordinator.api import values
from coordinator.api.validation.bounds import check_count
from engine.base.errors import InvalidRequest
from engine.base.types import Constraint, ConstraintKind
from engine.constraints.grammar import MAX_SOURCE_CHARS

MAX_CHOICES = 1000
# A regex of n parts may take n squared to compile.
MAX_REGEX_CHARS = 16 << 10
MAX_GRAMMAR_CHARS = 64 << 10
_ANY_OBJECT = Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "object"}')


def constraint_from(constraint: values.Constraint | None) -> Constraint | None:
    """The checked form of an output; None: free text. Raises InvalidRequest."""
    match constraint:
        case values.Constraint("json_schema", str(source)):
            source = _checked("json_schema", source, MAX_SOURCE_CHARS)
            return Constraint(ConstraintKind.JSON_SCHEMA, source)
        case values.Constraint("json_object", True):
            return _ANY_OBJECT
        case values.Constraint("regex", str(source)):
            source = _checked("regex", source, MAX_REGEX_CHARS)
            return Constraint(ConstraintKind.REGEX, source)
        case values.Constraint("grammar", str(source)):
            source = _checked("grammar", source, MAX_GRAMMAR_CHARS)
            return Constraint(ConstraintKind.LARK, source)
        case values.Constraint("choice", Sequence() as texts):
            return Constraint(ConstraintKind.LARK, _one_of(texts))
    return None


def _checked(kind: str, source: str, most: int) -> str:
    if not source.strip():
        raise InvalidRequest(f"constraint.{kind}", "empty")
    check_count(f"constraint.{kind}", len(source), most, "characters")
    return source


def _one_of(texts: Sequence[str]) -> str:
    """A grammar of these texts and no others."""
    field = "constraint.choice.choices"
    if not 1 <= len(texts) <= MAX_CHOICES:
        raise InvalidRequest(field, f"{len(texts)} choices; expected 1 to {MAX_CHOICES}")
    for i, text in enumerate(texts):
        if not text:
            raise InvalidRequest(f"{field}[{i}]", "empty; expected text")
    check_count(field, sum(map(len, texts)), MAX_GRAMMAR_CHARS, "characters")
    return "start: " + " | ".join(map(json.dumps, texts))
