"""Finds the form of a model's tool calls from its chat template.

The template renders a conversation with a call. The form whose parser reads that call back is the
model's. Where the template writes no call, or refuses the conversation, its source is looked at:
each form has texts that stand in it. A template that shows no tools gets their definitions in the
system message, which names a form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coordinator.text.reasoning import REASONING
from coordinator.text.tools.format import Tool, ToolFormat, ToolUse
from coordinator.text.tools.forms import FORMATS, NO_FORMAT
from coordinator.text.tools.json_forms import HARMONY, HERMES
from coordinator.text.tools.parser import ToolCalls
from engine.base.errors import InvalidRequest

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, Messages], str]
_QUESTION, _RESULT = "diptych-question", "diptych-result"
_NAME, _ID = "probe_tool", "abc123456"  # an id that all templates accept
_ARGUMENTS = {"city": "Oslo North", "days": 3}
_STRING, _INTEGER = ({"type": t, "description": "one"} for t in ("string", "integer"))
_PARAMETERS = {
    "type": "object",
    "properties": {"city": _STRING, "days": _INTEGER},
    "required": ["city"],
}
_DEFINITION = {
    "type": "function",
    "function": {"name": _NAME, "description": "two", "parameters": _PARAMETERS},
}
_TOOL = Tool(_NAME, _DEFINITION, schema="", strict=False)


@dataclass(frozen=True, slots=True)
class Detected:
    """The form of a model, and what it was found in."""

    form: ToolFormat
    evidence: str  # "rendered", "source", "prompt"; "": not known
    writes_calls: bool = False  # the template writes the calls of earlier turns


def detect(render: Render, source: str, *, shows_tools: bool) -> Detected:
    """The form of the template that `render` renders; `source` is its text.

    `render` raises InvalidRequest where the template refuses a conversation. `shows_tools`: the
    template writes the definitions of tools.
    """
    for text in _written_calls(render):
        for form in FORMATS.values():
            if _reads(form, text):
                return Detected(form, "rendered", writes_calls=True)
    for form in FORMATS.values():
        if all(sign in source for sign in form.signs):
            return Detected(form, "source", writes_calls=any(_written_calls(render)))
    if not shows_tools:
        return Detected(HERMES, "prompt")
    return Detected(NO_FORMAT, "", writes_calls=any(_written_calls(render)))


def _written_calls(render: Render) -> Iterator[str]:
    """What the template writes between a question and a result, where a call stands in it.

    Templates differ in what they accept: arguments as an object or as JSON, no content or an empty
    one, with and without a result.
    """
    question: Mapping[str, Any] = {"role": "user", "content": _QUESTION}
    result = {"role": "tool", "tool_call_id": _ID, "name": _NAME, "content": _RESULT}
    for arguments in (_ARGUMENTS, json.dumps(_ARGUMENTS)):
        for content in ("", None):
            call = {"name": _NAME, "arguments": arguments}
            calls = [{"id": _ID, "type": "function", "function": call}]
            turn = {"role": "assistant", "content": content, "tool_calls": calls}
            for messages in ([question, turn, result], [question, turn]):
                try:
                    text = render(messages, [_DEFINITION])
                except InvalidRequest:
                    continue
                text = text.rpartition(_QUESTION)[2].partition(_RESULT)[0]
                if _NAME in text and "Oslo North" in text:
                    yield text


def _reads(form: ToolFormat, text: str) -> bool:
    """Whether the parser of `form` finds the call in `text`."""
    if form is HARMONY:
        text = text.partition("assistant")[2]
        split = REASONING[HARMONY.name].reader(None).push(text)
        text = split.content.partition("<|call|>")[0]
    elif not form.trigger:
        text = "{" + text.partition("{")[2]
    parser = ToolCalls(ToolUse(form, (_TOOL,), (_TOOL,), required=False, single=True), _id)
    found = [*parser.push(text).pieces, *parser.flush(is_cut=False).pieces]
    return [(call.name, _value(call.arguments)) for call in found[:1]] == [(_NAME, _ARGUMENTS)]


def _id(call: int, name: str) -> str:
    return f"{call}"


def _value(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return None
