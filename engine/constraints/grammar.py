"""Converts a constraint to the text of a llguidance grammar, or to the reason why it has none.

These functions run in a process with limits of memory and CPU time (runner.py), because their cost
is not predictable. The text that they return compiles within those limits.
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
from engine.constraints.leniency import compilable_part
from engine.constraints.matcher import short_message
from engine.constraints.numbers import NumberScanner, step_of
from engine.constraints.schema_context import UnsupportedSchema
from engine.constraints.schemas import prepare_schema
from engine.constraints.special_tokens import MARK, with_token_ids, with_unspellable_names

MAX_SOURCE_CHARS = 1 << 20
# Matches \d and \w, and whole negated classes, which stay as they are. An unclosed class matches to
# the end in one pass, and llguidance refuses it.
_CLASS_ESCAPE = re.compile(r"\[\^\]?(?:\\.|[^\]\\])*+(?:\]|\\?\Z)|\\.", re.DOTALL)
_ASCII = {r"\d": "[0-9]", r"\w": "[0-9A-Za-z_]"}
# A mask that costs more than some ten milliseconds would delay all running requests.
LIMITS = LLParserLimits(step_max_items=16_000, step_lexer_fuel=200_000, verbose_errors=False)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The source of a model's tokenizer."""

    folder: Path  # contains tokenizer.json
    size: int  # rows of the model's output layer
    eos_token_ids: tuple[int, ...]

    def build(self) -> LLTokenizer:
        """Build the tokenizer; takes 0.2 s and holds the GIL."""
        text = with_unspellable_names(merged_tokenizer(self.folder))
        return LLTokenizer(text, n_vocab=self.size, eos_token=list(self.eos_token_ids) or None)


@dataclass(frozen=True, slots=True)
class Grammar:
    """A text that compiles within the limits, or the reason why there is none."""

    text: str = ""
    reason: str = ""  # "": it compiles
    scanner: NumberScanner | None = None
    # Index of the output whose tokens are refused; an empty reason then means that they do not fit.
    mismatch_index: int = -1
    cpu_s: float = 0.0  # CPU time of the compilation

    @property
    def num_chars(self) -> int:
        """The number of characters that it keeps in memory."""
        return len(self.text) + len(self.reason)


def grammar_of(
    tokenizer: LLTokenizer, constraint: Constraint, outputs: Sequence[Sequence[int]] = ()
) -> Grammar:
    """The constraint's grammar, compiled, and advanced by the tokens of each of `outputs`."""
    if (num_chars := len(constraint.source)) > MAX_SOURCE_CHARS:
        return Grammar(reason=f"{num_chars} characters; expected at most {MAX_SOURCE_CHARS}")
    try:
        text = _with_prologue(_text(constraint, tokenizer), constraint.prologue)
        text = _with_leading_text(text, constraint.leading_text)
    except UnsupportedSchema as error:
        return Grammar(reason=short_message(str(error)))
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        return Grammar(reason=f"not JSON: {short_message(what)}")
    template = LLMatcher(tokenizer, text, log_level=0, limits=LIMITS)
    if reason := compile_error(template):
        return Grammar(reason=reason)
    for i, tokens in enumerate(outputs):
        matcher = template.deep_copy()
        if not all(matcher.consume_token(token) for token in tokens):
            return Grammar(reason=mismatch(matcher), mismatch_index=i)
    return Grammar(text, scanner=_scanner(constraint))


def compilable_schema(tokenizer: LLTokenizer, schema: str, lenient: bool) -> Grammar:
    """A schema of `prepare_schema` if it compiles; else, if `lenient`, the part that does."""
    whole = json.loads(schema)
    style = whole.pop("x-guidance")

    def error_of(part: dict[str, Any]) -> str:
        source = json.dumps({**part, "x-guidance": style})
        try:
            grammar = LLMatcher.grammar_from_json_schema(source)
        except ValueError as error:  # 1e999
            return str(error)
        return compile_error(LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS))

    begun_s = time.thread_time()
    if not (reason := error_of(whole)):
        return Grammar(schema)
    if not lenient:
        return Grammar(reason=reason)
    part = compilable_part(whole, lambda part: not error_of(part), begun_s)
    return Grammar(json.dumps(part | {"x-guidance": style}))


def compile_error(template: LLMatcher) -> str:
    """Why a grammar cannot be used, or ""."""
    first = template.deep_copy()
    if not first.is_error():
        first.compute_bitmask()  # some limits are checked only here
    return short_message(first.get_error().replace(MARK, "")) if first.is_error() else ""


def mismatch(matcher: LLMatcher) -> str:
    """Why tokens were refused: "" if they do not fit, else the limit of llguidance."""
    error = short_message(matcher.get_error())
    return "" if error.startswith(("Parser Error: token", "parser stopped")) else error


def no_tokenizer(error: Exception) -> str:
    """The reason for all constraints if llguidance cannot read the model's tokenizer."""
    return f"none is possible with this model's tokenizer: {short_message(str(error))}"


def _scanner(constraint: Constraint) -> NumberScanner | None:
    begins = constraint.prologue  # its first line names the text after which JSON may begin
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            source = begins.partition("\n")[0] + "\n" + constraint.source
            return NumberScanner.of_lark(source) or NumberScanner(step=step_of(constraint.source))
        case ConstraintKind.LARK:
            return NumberScanner.of_lark(constraint.source, begins)
    return None


def _text(constraint: Constraint, tokenizer: LLTokenizer) -> str:
    """The constraint in llguidance's JSON. Raises UnsupportedSchema; ValueError or RecursionError
    if a schema is not JSON.
    """
    source = constraint.source
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return LLMatcher.grammar_from_json_schema(prepare_schema(source))
        case ConstraintKind.REGEX:
            return LLMatcher.grammar_from_regex(_with_ascii_classes(source))
        case ConstraintKind.LARK:
            return json.dumps({"grammars": [{"lark_grammar": with_token_ids(source, tokenizer)}]})


def _with_prologue(grammar: str, prologue: str) -> str:
    """The grammar after what the prologue describes."""
    if not prologue:
        return grammar
    whole = json.loads(grammar)
    whole["grammars"][0]["name"] = "text"
    whole["grammars"].insert(0, {"lark_grammar": prologue})
    return json.dumps(whole)


def _with_leading_text(grammar: str, leading_text: str) -> str:
    """The grammar after the text that the tokenizer strips from the start."""
    if not leading_text:
        return grammar
    whole = json.loads(grammar)
    whole["grammars"][0]["name"] = "led"
    whole["grammars"].insert(0, {"lark_grammar": f"start: {json.dumps(leading_text)} @led"})
    return json.dumps(whole)


def _with_ascii_classes(regex: str) -> str:
    r"""The regular expression with ASCII \d and \w, as vLLM's default compiler reads them.

    llguidance's \d and \w match all scripts, so an output could have digits that few readers know.
    """
    return _CLASS_ESCAPE.sub(lambda part: _ASCII.get(part[0], part[0]), regex)
