"""The messages of a conversation -> Messages. Pure.

Clients send an assistant's message back as history, with all fields that they know of such an
object. So unknown fields and parts of an assistant's message are ignored. A known field of a wrong
type is refused, and so is an unknown field of a message of another role.

    assistant   content | refusal | transcript of audio, tool_calls | function_call
    tool        content, tool_call_id        ("function", the older role, is the same)
    the others  content
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.api.openai.errors import unknown_parameter, unsupported
from coordinator.api.openai.models import Call, ChatMessage, Function, Part
from coordinator.text.values import Message, ToolCall
from engine.base.errors import InvalidRequest

_ASSISTANT = "assistant"
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# Parts of an output without text for templates.
_REASONING_PARTS = ("reasoning", "thinking", "redacted_thinking")
# Notes of clients and frameworks in messages of any role; they are no part of the prompt.
_NOTES = (
    *("additional_kwargs", "cache_control", "created_at", "id", "metadata"),
    *("provider_specific_fields", "response_metadata"),
)
_KNOWN = frozenset((*ChatMessage.__struct_fields__, *_NOTES))


def read_messages(
    messages: Sequence[ChatMessage], values: Sequence[Mapping[str, Any]]
) -> list[Message]:
    """The conversation, whose raw objects are `values`. Text parts are joined, others refused.

    Raises InvalidRequest, Refused.
    """
    return [_message(f"messages[{i}]", message, values[i]) for i, message in enumerate(messages)]


def _message(path: str, message: ChatMessage, values: Mapping[str, Any]) -> Message:
    role = message.role
    is_output = role == _ASSISTANT
    content = message.content
    if isinstance(content, list):
        content = _joined(f"{path}.content", content, is_output)
    calls = [
        _tool_call(f"{path}.tool_calls[{i}]", c) for i, c in enumerate(message.tool_calls or ())
    ]
    older = message.function_call
    if older is not None and not calls:
        calls = [ToolCall("", _name(f"{path}.function_call", older), _arguments(older))]
    if content is None:
        content = message.refusal
    if content is None and message.audio:
        content = message.audio.transcript
    if content is None and role == "function":  # null where a function returned nothing
        content = ""
    if content is None and not is_output:
        raise InvalidRequest(f"{path}.content", "unset; expected text")
    if content is None and not calls:
        if message.audio is not None:  # a reference to sound that this server has not
            raise unsupported(f"{path}.audio", "sound without a transcript")
        content = ""
    if not is_output and (others := values.keys() - _KNOWN):
        for key in values:
            if key in others and values[key] is not None:
                raise unknown_parameter(f"{path}.{key}"[:200])
    return Message(
        role="tool" if role == "function" else role,
        content=content,
        name=message.name or "",
        reasoning=_reasoning(message) if is_output else "",
        tool_calls=tuple(calls),
        tool_call_id=message.tool_call_id or "",
    )


def _reasoning(message: ChatMessage) -> str:
    """The reasoning of an earlier answer, under either name that servers give it."""
    other = message.reasoning if isinstance(message.reasoning, str) else ""
    return message.reasoning_content or other


def _joined(path: str, parts: Sequence[Part], is_output: bool) -> str:
    texts = []
    for i, part in enumerate(parts):
        kind = part.type
        if kind is None:
            raise InvalidRequest(f"{path}[{i}].type", 'unset; expected "text"')
        if is_output and kind in _REASONING_PARTS:
            continue
        if kind not in _TEXT_PARTS:
            raise unsupported(f"{path}[{i}].type", kind[:40])
        text = getattr(part, _TEXT_PARTS[kind])
        if text is None:
            raise InvalidRequest(f"{path}[{i}].{_TEXT_PARTS[kind]}", "unset; expected text")
        texts.append(text)
    return "\n".join(texts)


def _tool_call(path: str, call: Call) -> ToolCall:
    kind = call.type
    if kind == "custom":
        if call.custom is None:
            raise InvalidRequest(f"{path}.custom", "unset; expected a name and arguments")
        source = json.dumps({"input": call.custom.input or ""})
        return ToolCall(call.id or "", _name(f"{path}.custom", call.custom), source)
    if kind not in (None, "", "function"):
        raise unsupported(f"{path}.type", "any other than function")
    if call.function is None:
        raise InvalidRequest(f"{path}.function", "unset; expected a name and arguments")
    name = _name(f"{path}.function", call.function)
    return ToolCall(call.id or "", name, _arguments(call.function))


def _arguments(function: Function) -> str:
    """Arguments as JSON text; some clients send the object. The frontend checks the content."""
    arguments = function.arguments or ""
    return arguments if isinstance(arguments, str) else json.dumps(arguments)


def _name(path: str, function: Function) -> str:
    if not function.name:
        raise InvalidRequest(f"{path}.name", "unset; expected the name of a tool")
    return function.name
