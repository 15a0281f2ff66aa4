"""Constraint -> the text of a grammar, as the library takes it; or the reason why there is none.

These functions run in a process of their own (runner.py), whose memory and CPU time are bounded:
how long one of them takes, only running it tells. What they return may be compiled anywhere.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine.base.types import Constraint, ConstraintKind
from engine.checkpoint.added_tokens import merged_tokenizer
from engine.constraints.leniency import loosened
from engine.constraints.matcher import brief
from engine.constraints.numbers import NumberScanner, step_of
from engine.constraints.schemas import Refused, held
from engine.constraints.special_tokens import MARK, numbered, unspelled

MAX_SOURCE_CHARS = 1 << 20
# \d and \w; classes that exclude something, and all other escapes, stay as they are. One pass: a
# class that is not closed reaches to the end, where the library refuses it.
_CLASS_ESCAPE = re.compile(r"\[\^\]?(?:\\.|[^\]\\])*+(?:\]|\\?\Z)|\\.", re.DOTALL)
_ASCII = {r"\d": "[0-9]", r"\w": "[0-9A-Za-z_]"}
# A step with a mask that costs more than some ten milliseconds would hold up every answer.
LIMITS = LLParserLimits(step_max_items=16_000, step_lexer_fuel=200_000, verbose_errors=False)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Where a model's tokens are told of."""

    folder: Path  # with tokenizer.json
    size: int  # of the model
    eos_token_ids: tuple[int, ...]

    def build(self) -> LLTokenizer:
        """Takes a fifth of a second, and the interpreter with it."""
        text = unspelled(merged_tokenizer(self.folder))
        return LLTokenizer(text, n_vocab=self.size, eos_token=list(self.eos_token_ids) or None)


@dataclass(frozen=True, slots=True)
class Grammar:
    """What became of a constraint: a text that compiles within the limits, or a reason."""

    text: str = ""
    reason: str = ""  # "": none, it compiles
    scanner: NumberScanner | None = None
    misfit: int = -1  # index of the answer whose tokens are not taken; "": they do not fit
    cpu_s: float = 0.0  # that it took

    @property
    def num_chars(self) -> int:
        """What it keeps in memory."""
        return len(self.text) + len(self.reason)


def grammar_of(
    tokenizer: LLTokenizer, constraint: Constraint, answers: Sequence[Sequence[int]] = ()
) -> Grammar:
    """The constraint's grammar, tried: on its own, and behind the tokens of each of `answers`."""
    if (num_chars := len(constraint.source)) > MAX_SOURCE_CHARS:
        return Grammar(reason=f"{num_chars} characters; expected at most {MAX_SOURCE_CHARS}")
    try:
        text = _led(_text(constraint, tokenizer), constraint.lead)
    except Refused as error:
        return Grammar(reason=brief(str(error)))
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return Grammar(reason=f"not JSON: {brief(what)}")
    template = LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)
    if reason := fault(template):
        return Grammar(reason=reason)
    for i, tokens in enumerate(answers):
        matcher = template.deep_copy()
        if not all(matcher.consume_token(token) for token in tokens):
            return Grammar(reason=misfit(matcher), misfit=i)
    return Grammar(text, scanner=_scanner(constraint))


def fitting(tokenizer: LLTokenizer, schema: str, lenient: bool) -> Grammar:
    """A schema made by `held` as `text`, if it compiles; else the part that does, if `lenient`."""
    whole = json.loads(schema)
    style = whole.pop("x-guidance")

    def why_not(part: dict[str, Any]) -> str:
        source = json.dumps({**part, "x-guidance": style})
        try:
            grammar = LLMatcher.grammar_from_json_schema(source)
        except ValueError as error:  # 1e999
            return str(error)
        return fault(LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS))

    begun_s = time.thread_time()
    if not (reason := why_not(whole)):
        return Grammar(schema)
    if not lenient:
        return Grammar(reason=reason)
    left = loosened(whole, lambda part: not why_not(part), begun_s) | {"x-guidance": style}
    return Grammar(json.dumps(left))


def fault(template: LLMatcher) -> str:
    """Why a grammar is of no use; ""."""
    first = template.deep_copy()
    if not first.is_error():
        first.compute_bitmask()  # some limits show only here
    return brief(first.get_error().replace(MARK, "")) if first.is_error() else ""


def misfit(matcher: LLMatcher) -> str:
    """Why tokens were not taken: "" where they do not fit, else a limit of the library's."""
    error = brief(matcher.get_error())
    return "" if error.startswith(("Parser Error: token", "parser stopped")) else error


def no_tokenizer(error: Exception) -> str:
    """The reason for all constraints where the library cannot read the model's tokenizer."""
    return f"none is possible with this model's tokenizer: {brief(str(error))}"


def _scanner(constraint: Constraint) -> NumberScanner | None:
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return NumberScanner(step=step_of(constraint.source))
        case ConstraintKind.LARK:
            return NumberScanner.of_lark(constraint.source)
    return None


def _text(constraint: Constraint, tokenizer: LLTokenizer) -> str:
    """As the library takes it: a JSON list of grammars, in which a source is a value or a text.

    Raises Refused; ValueError, RecursionError where a schema is not JSON.
    """
    source = constraint.source
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(held(source))
        case ConstraintKind.REGEX:
            return LLMatcher.grammar_from_regex(_in_ascii(source))
        case ConstraintKind.LARK:
            return json.dumps({"grammars": [{"lark_grammar": numbered(source, tokenizer)}]})


def _led(grammar: str, lead: str) -> str:
    """The grammar behind what the tokenizer strips from the start of a text."""
    if not lead:
        return grammar
    whole = json.loads(grammar)
    whole["grammars"][0]["name"] = "led"
    whole["grammars"].insert(0, {"lark_grammar": f"start: {json.dumps(lead)} @led"})
    return json.dumps(whole)


def _in_ascii(regex: str) -> str:
    r"""The same with the \d and \w of ASCII, as vLLM's default compiler reads them.

    The library's are those of all scripts, and a model that is held to them may well write digits
    that no reader takes for numbers. What is allowed only shrinks.
    """
    return _CLASS_ESCAPE.sub(lambda part: _ASCII.get(part[0], part[0]), regex)
