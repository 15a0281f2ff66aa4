"""How models write tool calls: one description a family, from which all else follows.

    ToolFormat --.-- write()    a call of an earlier turn, and the example of the default prompt
                 |-- grammar()  what the answer must be, as a Lark grammar for the decode worker
                 '-- ToolCalls  (tool_parser.py) the answer's text -> pieces of calls

The family is told from the chat template's text, which writes earlier calls as the model writes its
own. Answers are held to exactly the form below by their grammar; the parser reads it with any white
space, so that it needs no grammar to be right.

    hermes       <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>, one a line
    llama3       {"name": "f", "parameters": {...}}, the whole answer, one call
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
from engine.constraints.schemas import Leniency, held

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One family. A call is `begin` + name + `middle` + arguments + `end`.

    `trigger` begins every call, or (`as_list`) once all of them; without one an answer is a call
    from its first character on, or none.
    """

    name: str
    trigger: str
    begin: str
    middle: str
    end: str
    separator: str  # between calls
    as_list: bool = False  # after the trigger: "[" calls "]"
    single: bool = False  # the family knows one call an answer
    lead: str = ""  # may stand before a call and says nothing
    id_chars: int = 24  # length of a call's id
    short_ids: bool = False  # templates refuse ids of another length
    # Markers that are tokens of their own in the model's vocabulary.
    tokens: Mapping[str, int] = field(default_factory=dict)

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls of (name, arguments as JSON), as the model writes them."""
        bodies = [self.begin + name + self.middle + args + self.end for name, args in calls]
        if self.as_list:
            return f"{self.trigger}[{self.separator.join(bodies)}]"
        return self.separator.join(self.trigger + body for body in bodies)

    def call_id(self, given: str) -> str:
        """A call's id as the family's templates take it: the same for the call and its result.

        Conversations begun elsewhere bring ids of another form, or none.
        """
        if not self.short_ids or (len(given) == self.id_chars and given.isalnum()):
            return given
        return sha256(given.encode()).hexdigest()[: self.id_chars]

    @property
    def markers(self) -> tuple[str, ...]:
        """What may be one token: such a token is read even where special tokens are not shown."""
        found = re.findall(r"</?\w+>|\[[A-Z_]+\]|<\|\w+\|>", self.lead + self.write([("", "")]))
        return tuple(dict.fromkeys(found))

    def bound(self, tokenizer: Tokenizer) -> ToolFormat:
        """The same, with the vocabulary's tokens for its markers."""
        added = tokenizer.library.get_added_tokens_decoder()
        ids = {token.content: token_id for token_id, token in added.items()}
        return replace(self, tokens={m: ids[m] for m in self.markers if m in ids})


HERMES = ToolFormat(
    name="hermes",
    trigger="<tool_call>",
    begin='\n{"name": "',
    middle='", "arguments": ',
    end="}\n</tool_call>",
    separator="\n",
)
LLAMA3 = ToolFormat(
    name="llama3",
    trigger="",
    begin='{"name": "',
    middle='", "parameters": ',
    end="}",
    separator="",
    single=True,
    lead="<|python_tag|>",
)
MISTRAL = ToolFormat(
    name="mistral",
    trigger="[TOOL_CALLS]",
    begin='{"name": "',
    middle='", "arguments": ',
    end="}",
    separator=", ",
    as_list=True,
    id_chars=9,
    short_ids=True,
)
MISTRAL_ARGS = ToolFormat(
    name="mistral_args",
    trigger="[TOOL_CALLS]",
    begin="",
    middle="[ARGS]",
    end="",
    separator="",
    id_chars=9,
    short_ids=True,
)
FORMATS = {f.name: f for f in (HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS)}


def choose_format(option: str, template: str) -> ToolFormat:
    """The family that `option` names; "auto": the one that the template's text tells of."""
    if option != AUTO:
        return FORMATS[option]
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if "<tool_call>" not in template and re.search(r"""["']parameters["']\s*:""", template):
        return LLAMA3
    return HERMES


# Arguments have the white space in which templates write earlier calls.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_SHORT_SCHEMA = 16 << 10  # characters; no more than 512 of these are kept
ANY_OBJECT = held('{"type": "object"}', Leniency.ALL, _STYLE)


def argument_schema(parameters: Mapping[str, Any], strict: bool) -> str:
    """A tool's schema as a grammar takes it. Raises, of a strict one, Refused and what `held` does;
    one that is not strict loses what cannot be held.
    """
    try:
        source = json.dumps(parameters)
        short = len(source) <= _SHORT_SCHEMA
        made = _short_schema(source, strict) if short else _argument_schema(source, strict)
        return made if strict or len(made) <= MAX_SOURCE_CHARS else ANY_OBJECT
    except (ValueError, RecursionError):
        if strict:
            raise
        return ANY_OBJECT


def _argument_schema(source: str, strict: bool) -> str:
    return held(source, Leniency.NONE if strict else Leniency.ALL, _STYLE)


_short_schema = lru_cache(maxsize=512)(_argument_schema)  # each turn of a conversation has them


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    definition: Mapping[str, Any]  # {"type": "function", "function": {...}}, as templates take it
    schema: str  # of the arguments, as a grammar takes it
    strict: bool  # else what grammars cannot hold of the schema is left out


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What one request may call, and whether it must."""

    format: ToolFormat
    tools: tuple[Tool, ...]  # all of them: the prompt shows them
    callable: tuple[Tool, ...]  # those that the answer may call
    required: bool
    single: bool  # at most one call
    text_schema: str | None = None  # of text where no call is made, as a grammar takes it

    @property
    def names(self) -> frozenset[str]:
        """Of the tools that may be called."""
        return frozenset(tool.name for tool in self.callable)


def tool_grammar(
    use: ToolUse, text_schema: str | None = None, schemas: Mapping[str, str] | None = None
) -> Constraint:
    """What the answer must be: calls, or text (a JSON text of `text_schema`) where none need be.

    Text ends where a call begins: from its trigger on, the rest of the answer is calls. `schemas`:
    of arguments, by the names of their tools, where they are not the tools' own.
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
    """The text from which on an answer is JSON; "": its first character."""
    if use.required or text_schema is not None:
        return ""
    return use.format.trigger or use.format.begin.partition(" ")[0]


def _start(use: ToolUse, text_schema: str | None) -> list[str]:
    """The rule `start`, and how text goes over into calls."""
    form = use.format
    lead = f"{_lark(form, form.lead)}? " if form.lead in form.tokens else ""
    trigger = _lark(form, form.trigger)
    if use.required:
        return [f"start: {lead}{trigger} calls".replace("  ", " ")]
    if text_schema is not None:
        return [f"start: text | {trigger} calls"]
    if not form.trigger:
        names = "|".join(re.escape(name) for name in sorted(use.names))
        space = r"[ \t\r\n]*"
        begins = rf"{space}\{{{space}\"name\"{space}:{space}\"({names})\"(?s:.*)"
        return [f"start: TEXT | {lead}calls", f"TEXT: /(?s:.+)/ & ~/{begins}/"]
    if form.trigger in form.tokens:
        # Text may not spell the trigger out either: who reads the answer could not tell.
        spelled = f"/(?s:.*){re.escape(form.trigger)}(?s:.*)/"
        return [f"start: TEXT? ({trigger} calls)?", f"TEXT: /(?s:.+)/ & ~{spelled}"]
    # The lazy rule wins over TEXT as soon as the trigger is complete.
    return ["start: TEXT | before calls", f"before[lazy]: /(?s:.*)/ {trigger}", "TEXT: /(?s:.+)/"]


def _lark(form: ToolFormat, literal: str) -> str:
    """A literal in Lark; markers that are tokens of their own are written as those."""
    if not literal:
        return ""
    if not form.tokens:
        return json.dumps(literal)
    parts = re.split("(" + "|".join(map(re.escape, form.tokens)) + ")", literal)
    written = [f"<[{form.tokens[p]}]>" if p in form.tokens else json.dumps(p) for p in parts if p]
    return " ".join(written)
