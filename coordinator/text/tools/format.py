"""The forms in which models write tool calls: one description a family.

    ToolFormat --.-- write()         calls of earlier messages, and an example in the prompt
                 |-- tool_grammar()  (grammar.py) constrains the output, for the decode worker
                 '-- ToolCalls       (parser.py) text of the output -> calls

A format is a frame around calls, and a body, which is how one call is written:

    trigger opening  begin NAME middle ARGUMENTS end  separator  begin ...  closing
    \\_ once, or before each call _/  \\_ the body _/

    json_body.py     arguments are a JSON object
    tagged_body.py   each argument stands between tags; texts are raw, other values JSON
    literal_body.py  arguments are literals of another language

All forms stand in forms.py, and detection.py finds a model's from its chat template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from typing import Any, Protocol

from coordinator.text.tokenizer import Tokenizer
from coordinator.text.tools.cursor import Cursor, Reading, filled
from engine.constraints.grammar import MAX_SOURCE_CHARS
from engine.constraints.schema_context import Leniency
from engine.constraints.schemas import prepare_schema

AUTO, UNKNOWN = "auto", "none"  # of --tool-format
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_SAMPLE = ("f", '{"a": "b", "c": 1}')  # a call that shows all markers of a form
Write = Callable[[str], str]  # a literal in the language of grammars


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call."""

    name: str
    definition: Mapping[str, Any]  # {"type": "function", "function": {...}}, for templates
    schema: str  # of the arguments, prepared for a grammar
    strict: bool  # else unsupported parts of the schema are dropped

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The schema of the arguments as the client wrote it."""
        return self.definition["function"].get("parameters") or NO_PARAMETERS


class Body(Protocol):
    """How one call is written. Literals may have places (cursor.py)."""

    @property
    def begin(self) -> str:
        """The text before the name."""

    @property
    def middle(self) -> str:
        """The text between name and arguments."""

    @property
    def end(self) -> str:
        """The text after the arguments."""

    @property
    def is_json(self) -> bool:
        """Whether arguments are written as JSON."""

    def write(self, arguments: str) -> str:
        """Arguments, which are JSON or any other text, in this form."""

    def rules(self, index: int, schema: str, lark: Write) -> list[str]:
        """The rules of a grammar that define `args_{index}`, by a prepared schema."""

    def not_enforced(self, parameters: Mapping[str, Any]) -> str:
        """The keyword of a schema that this form cannot enforce; "": all are enforced."""

    def read(self, cursor: Cursor, tool: Tool) -> Reading[bool]:
        """Read arguments and `end`, and set the cursor's arguments; False: the end is missing."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One family. Without a trigger the whole output is a call or text."""

    name: str
    body: Body
    trigger: str = ""
    once: bool = False  # the trigger precedes all calls, else each
    opening: str = ""  # after the trigger
    separator: str = ""  # between calls
    closing: str = ""  # after the last call
    single: bool = False  # at most one call in an output
    text_begin: str = ""  # before text, in models that mark it
    text_end: str = ""
    header: str = ""  # of a message with calls, before the trigger
    prefix: str = ""  # may stand before a call, without a meaning
    id_chars: int = 24  # length of a call's id
    short_ids: bool = False  # templates refuse ids of another length
    numbered_ids: bool = False  # ids are functions.NAME:INDEX
    loose_newlines: bool = False  # some models of the family leave line breaks out
    signs: tuple[str, ...] = ()  # all of them stand in the source of the family's templates
    # The markers that are single tokens in the model's vocabulary.
    tokens: Mapping[str, int] = field(default_factory=dict)

    def write(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls of (name, arguments as JSON) in the form of the family."""
        bodies = [self._written(i, *call) for i, call in enumerate(calls)]
        before = self.trigger + self.opening
        if self.once:
            return before + self.separator.join(bodies) + self.closing
        return self.separator.join(before + body for body in bodies)

    def _written(self, index: int, name: str, arguments: str) -> str:
        body = self.body
        values = {"{index}": str(index), "{id}": self.short_id(f"{index}"), "{type}": ""}
        head = filled(body.begin, values) + name + filled(body.middle, values)
        return head + body.write(arguments) + filled(body.end, values)

    def short_id(self, original: str) -> str:
        """An id of the form's length, equal for equal originals."""
        return sha256(original.encode()).hexdigest()[: self.id_chars]

    def call_id(self, original: str) -> str:
        """An id in the form of the family's templates; equal for a call and its result.

        Conversations from other servers have ids of another form, or none.
        """
        if not self.short_ids or (len(original) == self.id_chars and original.isalnum()):
            return original
        return self.short_id(original)

    @property
    def is_unknown(self) -> bool:
        """Whether it stands for a form that is not known: calls are neither written nor read."""
        return self.name == UNKNOWN

    @property
    def sample(self) -> str:
        """Text with all markers of the form."""
        parts = (self.prefix, self.text_begin, self.text_end, self.header)
        return "".join((*parts, self.write([_SAMPLE, _SAMPLE])))

    def bound(self, tokenizer: Tokenizer) -> ToolFormat:
        """The format with the tokens of its markers in a vocabulary.

        They are read even if special tokens are not shown.
        """
        sample = self.sample
        added = tokenizer.library.get_added_tokens_decoder()
        names = {token.content: token_id for token_id, token in added.items()}
        found = {n: i for n, i in names.items() if n in sample and _is_marker(n)}
        longest_first = sorted(found, key=len, reverse=True)
        return replace(self, tokens={name: found[name] for name in longest_first})


def _is_marker(name: str) -> bool:
    """Whether an added token is a marker; some vocabularies add words and runs of spaces."""
    return len(name) > 2 and name[0] in "<[]｜" and not name.isspace()


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
class ToolUse:
    """The tools of one request."""

    format: ToolFormat
    tools: tuple[Tool, ...]  # all tools, which the prompt shows
    callable: tuple[Tool, ...]  # the tools that the output may call; none: it is text
    required: bool  # whether the output must be calls
    single: bool  # at most one call
    text_schema: str | None = None  # of the text of an output without calls, prepared

    @property
    def by_name(self) -> dict[str, Tool]:
        """The callable tools."""
        return {tool.name: tool for tool in self.callable}
