"""The messages of a conversation -> Messages. Pure.

What an API returned as an assistant's message comes back as history, dumped by its client with all
that this client knows of such an object. So an assistant's message may hold fields and parts that
are not known here: they are passed over. A field that is known and of a wrong type is refused, and
so is an unknown field of a message that the application wrote itself.

    assistant   content | refusal | transcript of audio, tool_calls | function_call
    tool        content, tool_call_id        ("function", the older role, is the same)
    the others  content
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from coordinator.api.openai.errors import unsupported
from coordinator.api.openai.fields import Fields, as_object
from coordinator.api.values import Message, ToolCall
from engine.base.errors import InvalidRequest

_ASSISTANT = "assistant"
_ROLES = ("system", "developer", "user", _ASSISTANT, "tool", "function")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# Parts of an output that templates take no text from.
_REASONING_PARTS = ("reasoning", "thinking", "redacted_thinking")
# Clients and frameworks note these in messages of any role; they are no part of the prompt.
_NOTES = (
    "additional_kwargs",
    "cache_control",
    "created_at",
    "id",
    "metadata",
    "provider_specific_fields",
    "response_metadata",
)


def read_messages(fields: Fields) -> list[Message]:
    """The conversation; parts of text are joined, parts of other kinds refused by name."""
    values = fields.list("messages")
    if not values:
        raise InvalidRequest("messages", "expected an array of at least one message")
    return [_message(as_object(f"messages[{i}]", value)) for i, value in enumerate(values)]


def _message(fields: Fields) -> Message:
    role = fields.text("role")
    if role not in _ROLES:
        raise InvalidRequest(fields.path("role"), f"expected one of {', '.join(_ROLES)}")
    is_output = role == _ASSISTANT
    content = _content(fields, is_output)
    calls = _tool_calls(fields)
    refusal = fields.text("refusal")
    transcript = _transcript(fields)
    if content is None:
        content = refusal if refusal is not None else transcript
    if content is None and role == "function":  # null where a function returned nothing
        content = ""
    if content is None and not is_output:
        raise InvalidRequest(fields.path("content"), "unset; expected text")
    if content is None and not calls:
        _check_audio(fields)
        content = ""
    name, answers = fields.text("name") or "", fields.text("tool_call_id") or ""
    fields.list("annotations")
    if not is_output:
        fields.end(_NOTES, nulls=True)
    return Message(
        role="tool" if role == "function" else role,
        content=content,
        name=name,
        tool_calls=tuple(calls),
        tool_call_id=answers,
    )


def _content(fields: Fields, is_output: bool) -> str | None:
    path, value = fields.path("content"), fields.take("content")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise InvalidRequest(path, "expected text or an array of parts")
    texts = []
    for i, item in enumerate(value):
        part = as_object(f"{path}[{i}]", item)
        kind = part.text("type")
        if kind is None:
            raise InvalidRequest(part.path("type"), 'unset; expected "text"')
        if is_output and kind in _REASONING_PARTS:
            continue
        if kind not in _TEXT_PARTS:
            raise unsupported(part.path("type"), kind[:40])
        text = part.text(_TEXT_PARTS[kind])
        if text is None:
            raise InvalidRequest(part.path(_TEXT_PARTS[kind]), "unset; expected text")
        texts.append(text)
    return "\n".join(texts)


def _transcript(fields: Fields) -> str | None:
    """What an assistant's sound says; the sound is not here."""
    audio = fields.object("audio")
    return audio.text("transcript") if audio else None


def _check_audio(fields: Fields) -> None:
    """Refuse a message that is sound alone, of which there is no more than its id."""
    if fields.object("audio") is not None:
        raise unsupported(fields.path("audio"), "sound without a transcript")


def _tool_calls(fields: Fields) -> Sequence[ToolCall]:
    path = fields.path("tool_calls")
    calls = [
        _tool_call(as_object(f"{path}[{i}]", value))
        for i, value in enumerate(fields.list("tool_calls") or ())
    ]
    older = fields.object("function_call")
    if older is not None and not calls:
        calls = [_call_of(older, "")]
    return calls


def _tool_call(fields: Fields) -> ToolCall:
    kind = fields.text("type")
    given = fields.text("id") or ""
    if kind == "custom":
        custom = _needed(fields, "custom")
        source = json.dumps({"input": custom.text("input") or ""})
        return ToolCall(id=given, name=_name(custom), arguments=source)
    if kind not in (None, "", "function"):
        raise unsupported(fields.path("type"), "any other than function")
    return _call_of(_needed(fields, "function"), given)


def _call_of(function: Fields, given: str) -> ToolCall:
    """A call of a function; what its arguments hold is the frontend's affair."""
    arguments = function.take("arguments")
    if isinstance(arguments, dict):  # some clients send the object itself
        arguments = json.dumps(arguments)
    if arguments is not None and not isinstance(arguments, str):
        raise InvalidRequest(function.path("arguments"), "expected JSON as text")
    return ToolCall(id=given, name=_name(function), arguments=arguments or "")


def _needed(fields: Fields, key: str) -> Fields:
    found = fields.object(key)
    if found is None:
        raise InvalidRequest(fields.path(key), "unset; expected a name and arguments")
    return found


def _name(function: Fields) -> str:
    name = function.text("name")
    if not name:
        raise InvalidRequest(function.path("name"), "unset; expected the name of a tool")
    return name
