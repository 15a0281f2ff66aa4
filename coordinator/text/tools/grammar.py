"""The grammar of an output of text and tool calls, in Lark as llguidance reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import partial

from coordinator.text.tools.cursor import fixed_parts, places, regex_of
from coordinator.text.tools.format import ToolFormat, ToolUse
from coordinator.text.tools.typed_values import may_be_text
from engine.base.types import Constraint, ConstraintKind
from engine.constraints.numbers import json_after

_OF_PLACE = {"{index}": "/[0-9]{1,3}/", "{name}": "/[A-Za-z0-9_.-]{1,64}/"}


def tool_grammar(
    use: ToolUse, text_schema: str | None = None, schemas: Mapping[str, str] | None = None
) -> Constraint:
    """The constraint of an output: calls, or, unless required, text (JSON of `text_schema`).

    From the first trigger on, the rest of the output is calls. `schemas` replaces the schemas of
    tools, by name.
    """
    form, schemas = use.format, schemas or {}
    body, lark = form.body, partial(_lark, form)
    # What stands between calls is one text with the next one's begin, since lexers do not go back.
    more = form.separator + ("" if form.once else form.trigger + form.opening)
    kinds = {"first": form.opening} if use.single else {"first": form.opening, "next": more}
    rules = []
    for kind in kinds:
        rules.append(f"{kind}: " + " | ".join(f"{kind}_{i}" for i in range(len(use.callable))))
    for i, tool in enumerate(use.callable):
        for kind, before in kinds.items():
            head = lark(before + body.begin + tool.name + body.middle)
            rules.append(f"{kind}_{i}: {head} args_{i} {lark(body.end)}".rstrip())
        rules += body.rules(i, schemas.get(tool.name, tool.schema), lark)
    calls = "first" if use.single else "first next*"
    rules.append(f"calls: {calls} {lark(form.closing)}".rstrip())
    if text_schema is not None:
        rules.append(f"text: %json {text_schema}")
    lines = [*_start(use, text_schema), *rules]
    # Where texts are written raw, digits in them must not be taken for numbers.
    is_json = form.body.is_json or not any(may_be_text(tool.parameters) for tool in use.callable)
    bounds_numbers = is_json or text_schema is not None
    header = json_after(_json_begins(use, text_schema)) if bounds_numbers else ""
    return Constraint(ConstraintKind.LARK, header + "\n".join(lines) + "\n")


def _json_begins(use: ToolUse, text_schema: str | None) -> str:
    """The text after which an output is JSON; "": from its start."""
    if use.required or text_schema is not None:
        return ""
    return use.format.trigger or use.format.body.begin.partition(" ")[0]


def _start(use: ToolUse, text_schema: str | None) -> list[str]:
    """The rule `start`, with the transition from text to calls."""
    form = use.format
    prefix = f"{_lark(form, form.prefix)}? " if form.prefix in form.tokens else ""
    trigger = _lark(form, form.header + form.trigger)
    begin, end = _lark(form, form.text_begin), _lark(form, form.text_end)
    if use.required:
        return [f"start: {prefix}{trigger} calls".replace("  ", " ")]
    if text_schema is not None:
        return [f"start: {begin} text {end} | {trigger} calls"]
    if begin:
        return [f"start: {begin} TEXT? {end} | {trigger} calls", "TEXT: /(?s:.+)/"]
    if not form.trigger:
        names = "|".join(re.escape(name) for name in sorted(use.by_name))
        space = r"[ \t\r\n]*"
        begins = rf"{space}\{{{space}\"name\"{space}:{space}\"({names})\"(?s:.*)"
        return [f"start: TEXT | {prefix}calls", f"TEXT: /(?s:.+)/ & ~/{begins}/"]
    if trigger.startswith("<["):
        # The text must not contain the trigger: readers could not tell it from the token.
        spelled = f"/(?s:.*){regex_of(form.trigger)}(?s:.*)/"
        return [f"start: TEXT? ({trigger} calls)?", f"TEXT: /(?s:.+)/ & ~{spelled}"]
    # The lazy rule takes precedence over TEXT once the trigger is complete.
    return ["start: TEXT | before calls", f"before[lazy]: /(?s:.*)/ {trigger}", "TEXT: /(?s:.+)/"]


def _lark(form: ToolFormat, literal: str) -> str:
    """A literal in Lark: tokens for markers, regular expressions for places."""
    fixed, between = fixed_parts(literal), places(literal)
    written: list[str] = []
    for i, part in enumerate(fixed):
        if i:
            of_id = f"/[A-Za-z0-9]{{{form.id_chars}}}/"
            written.append(_OF_PLACE.get(between[i - 1], of_id))
        written += _pieces(form, part)
    return " ".join(written)


def _pieces(form: ToolFormat, text: str) -> Iterator[str]:
    """Texts and tokens; line breaks may be left out where models of the family do so."""
    markers = [re.escape(marker) for marker in form.tokens]
    separators = [*markers, *(["\n"] if form.loose_newlines else ())]
    parts = re.split(f"({'|'.join(separators)})", text) if separators else [text]
    for part in parts:
        if part in form.tokens:
            yield f"<[{form.tokens[part]}]>"
        elif part == "\n" and form.loose_newlines:
            yield '"\\n"?'
        elif part:
            yield json.dumps(part)
