"""The forms in which models write tool calls: one description a family.

    ToolFormat --.-- write()         calls of earlier messages, and an example in the prompt
                 |-- tool_grammar()  the grammar that constrains the output, for the decode worker
                 '-- ToolCalls       (tool_parser.py) text of the output -> calls

The family is detected from the chat template, which writes earlier calls in the model's form. The
grammar allows exactly the form below. The parser accepts any white space, so it does not depend on
the grammar.

    hermes       <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>, one a line
    llama3       {"name": "f", "parameters": {...}}, the whole output, one call
    mistral      [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...]
    mistral_args [TOOL_CALLS]f[ARGS]{...}, one after the other
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from typing import Any

from coordinator.text.tokenizer import Tokenizer
from engine.base.types import Constraint, ConstraintKind
from engine.constraints.grammar import MAX_SOURCE_CHARS
from engine.constraints.numbers import json_after
from engine.constraints.schema_context import Leniency
from engine.constraints.schemas import prepare_schema

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One family. A call is `begin` + name + `middle` + arguments + `end`.

    `trigger` precedes each call, or with `as_list` all of them once; without a trigger the whole
    output is a call or text.
    """

    name: str
    trigger: str = ""
    begin: str = '{"name": "'
    middle: str = '", "arguments": '
    end: str = "}"
    separator: str = ""  # between calls
    as_list: bool = False  # after the trigger: "[" calls "]"
    single: bool = False  # at most one call in an output
    prefix: str = ""  # may stand before a call, without a meaning
    id_chars: int = 24  # length of a call's id
    short_ids: bool = False  # templates refuse ids of another length
    # The markers that are single tokens in the model's vocabulary.
    tokens: Mapping[str, int] = field(default_factory=dict)

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls of (name, arguments as JSON) in the form of the family."""
        bodies = [self.begin + name + self.middle + args + self.end for name, args in calls]
        if self.as_list:
            return f"{self.trigger}[{self.separator.join(bodies)}]"
        return self.separator.join(self.trigger + body for body in bodies)

    def call_id(self, original: str) -> str:
        """An id in the form of the family's templates; equal for a call and its result.

        Conversations from other servers have ids of another form, or none.
        """
        if not self.short_ids or (len(original) == self.id_chars and original.isalnum()):
            return original
        return sha256(original.encode()).hexdigest()[: self.id_chars]

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that may be single tokens, which are read even if special tokens are not shown."""
        found = re.findall(r"</?\w+>|\[[A-Z_]+\]|<\|\w+\|>", self.prefix + self.write([("", "")]))
        return tuple(dict.fromkeys(found))

    def bound(self, tokenizer: Tokenizer) -> ToolFormat:
        """The format with the tokens of its markers in a vocabulary."""
        added = tokenizer.library.get_added_tokens_decoder()
        ids = {token.content: token_id for token_id, token in added.items()}
        return replace(self, tokens={m: ids[m] for m in self.markers if m in ids})


HERMES = ToolFormat(
    name="hermes",
    trigger="<tool_call>",
    begin='\n{"name": "',
    end="}\n</tool_call>",
    separator="\n",
)
LLAMA3 = ToolFormat(name="llama3", middle='", "parameters": ', single=True, prefix="<|python_tag|>")
MISTRAL = ToolFormat(
    name="mistral",
    trigger="[TOOL_CALLS]",
    separator=", ",
    as_list=True,
    id_chars=9,
    short_ids=True,
)
MISTRAL_ARGS = replace(
    MISTRAL, name="mistral_args", begin="", middle="[ARGS]", end="", separator="", as_list=False
)
FORMATS = {f.name: f for f in (HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS)}


def choose_format(option: str, template: str) -> ToolFormat:
    """The family of the option --tool-format; "auto": detected from the template's source."""
    if option != AUTO:
        return FORMATS[option]
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if "<tool_call>" not in template and re.search(r"""["']parameters["']\s*:""", template):
        return LLAMA3
    return HERMES


# The white space of arguments in earlier calls, as templates write them.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_SHORT_SCHEMA = 16 << 10  # characters; no more than 512 of these are kept
ANY_OBJECT = prepare_schema('{"type": "object"}', Leniency.ALL, _STYLE)


def argument_schema(parameters: Mapping[str, Any], strict: bool) -> str:
    """A tool's schema, prepared for a grammar; one that is not strict loses unsupported parts.

    Raises UnsupportedSchema, ValueError or RecursionError for a strict one.
    """
    try:
        source = json.dumps(parameters)
        short = len(source) <= _SHORT_SCHEMA
        schema = _short_schema(source, strict) if short else _argument_schema(source, strict)
        return schema if strict or len(schema) <= MAX_SOURCE_CHARS else ANY_OBJECT
    except (ValueError, RecursionError):
        if strict:
            raise
        return ANY_OBJECT


def _argument_schema(source: str, strict: bool) -> str:
    return prepare_schema(source, Leniency.NONE if strict else Leniency.ALL, _STYLE)


_short_schema = lru_cache(maxsize=512)(_argument_schema)  # requests of a conversation repeat them


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    definition: Mapping[str, Any]  # {"type": "function", "function": {...}}, for templates
    schema: str  # of the arguments, prepared for a grammar
    strict: bool  # else unsupported parts of the schema are dropped


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request."""

    format: ToolFormat
    tools: tuple[Tool, ...]  # all tools, which the prompt shows
    callable: tuple[Tool, ...]  # the tools that the output may call
    required: bool  # whether the output must be calls
    single: bool  # at most one call
    text_schema: str | None = None  # of the text of an output without calls, prepared

    @property
    def names(self) -> frozenset[str]:
        """Names of the callable tools."""
        return frozenset(tool.name for tool in self.callable)


def tool_grammar(
    use: ToolUse, text_schema: str | None = None, schemas: Mapping[str, str] | None = None
) -> Constraint:
    """The constraint of an output: calls, or, unless required, text (JSON of `text_schema`).

    From the first trigger on, the rest of the output is calls. `schemas` replaces the schemas of
    tools, by name.
    """
    form, schemas = use.format, schemas or {}
    bodies = " | ".join(f"body_{i}" for i in range(len(use.callable)))
    rules = [f"body: {bodies}"]
    for i, tool in enumerate(use.callable):
        head, tail = form.begin + tool.name + form.middle, form.end
        rules.append(f"body_{i}: {_lark(form, head)} args_{i} {_lark(form, tail)}".rstrip())
        rules.append(f"args_{i}: %json {schemas.get(tool.name, tool.schema)}")
    more = _lark(form, form.separator + ("" if form.as_list else form.trigger))
    calls = "body" if use.single else f"body ({more} body)*"
    if form.as_list:
        calls = f'"[" {calls} "]"'
    rules.append(f"calls: {calls}")
    if text_schema is not None:
        rules.append(f"text: %json {text_schema}")
    lines = [*_start(use, text_schema), *rules]
    source = json_after(_json_begins(use, text_schema)) + "\n".join(lines) + "\n"
    return Constraint(ConstraintKind.LARK, source)


def _json_begins(use: ToolUse, text_schema: str | None) -> str:
    """The text after which an output is JSON; "": from its start."""
    if use.required or text_schema is not None:
        return ""
    return use.format.trigger or use.format.begin.partition(" ")[0]


def _start(use: ToolUse, text_schema: str | None) -> list[str]:
    """The rule `start`, with the transition from text to calls."""
    form = use.format
    prefix = f"{_lark(form, form.prefix)}? " if form.prefix in form.tokens else ""
    trigger = _lark(form, form.trigger)
    if use.required:
        return [f"start: {prefix}{trigger} calls".replace("  ", " ")]
    if text_schema is not None:
        return [f"start: text | {trigger} calls"]
    if not form.trigger:
        names = "|".join(re.escape(name) for name in sorted(use.names))
        space = r"[ \t\r\n]*"
        begins = rf"{space}\{{{space}\"name\"{space}:{space}\"({names})\"(?s:.*)"
        return [f"start: TEXT | {prefix}calls", f"TEXT: /(?s:.+)/ & ~/{begins}/"]
    if form.trigger in form.tokens:
        # The text must not contain the trigger: readers could not tell it from the token.
        spelled = f"/(?s:.*){re.escape(form.trigger)}(?s:.*)/"
        return [f"start: TEXT? ({trigger} calls)?", f"TEXT: /(?s:.+)/ & ~{spelled}"]
    # The lazy rule takes precedence over TEXT once the trigger is complete.
    return ["start: TEXT | before calls", f"before[lazy]: /(?s:.*)/ {trigger}", "TEXT: /(?s:.+)/"]


def _lark(form: ToolFormat, literal: str) -> str:
    """A literal in Lark; markers that are single tokens are written as tokens."""
    if not literal:
        return ""
    if not form.tokens:
        return json.dumps(literal)
    parts = re.split("(" + "|".join(map(re.escape, form.tokens)) + ")", literal)
    written = [f"<[{form.tokens[p]}]>" if p in form.tokens else json.dumps(p) for p in parts if p]
    return " ".join(written)
