"""Converts conversations and tools in the form of OpenAI's API to protobuf messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from engine.pb.diptych.v1 import inference_pb2 as pb

_MODES = ("none", "auto", "required")
_FIELDS = frozenset(("role", "content", "name", "tool_call_id"))
_REASONING_PARTS = ("reasoning", "thinking", "redacted_thinking")


def message(turn: Mapping[str, Any]) -> pb.Message:
    """One message: role, content, name, tool_calls, tool_call_id. Raises ValueError for other keys.

    A message that an API has returned may have more keys. They are ignored, except for an
    old-style `function_call`, and text in `refusal` or `audio`.
    """
    fields = {key: value for key, value in turn.items() if value is not None}
    calls = [_tool_call(call) for call in fields.pop("tool_calls", ())]
    is_output = fields.get("role") == "assistant"
    if is_output:
        if not calls and (older := fields.get("function_call")):
            calls = [_tool_call(older)]
        elsewhere = fields.get("refusal", fields.get("audio", {}).get("transcript"))
        fields = {key: fields[key] for key in _FIELDS & fields.keys()}
        if elsewhere is not None:
            fields.setdefault("content", elsewhere)
    if isinstance(content := fields.get("content"), list):
        parts = [p for p in content if not (is_output and p.get("type") in _REASONING_PARTS)]
        fields["content"] = "\n".join(map(_text_of, parts))
    return pb.Message(tool_calls=calls, **fields)


def _text_of(part: Mapping[str, Any]) -> str:
    """The text of a content part. Raises ValueError for a part of another kind."""
    text = part.get("text", part.get("refusal"))
    if not isinstance(text, str):
        raise ValueError(f"content: expected parts of text, got {part.get('type')!r}")
    return text


def tool_choice(choice: str | Mapping[str, Any] | None) -> pb.ToolChoice | None:
    """A mode or a tool; None: the server's default. Raises ValueError."""
    if choice is None:
        return None
    if isinstance(choice, str):
        if choice not in _MODES:
            raise ValueError(f"tool_choice: expected {', '.join(_MODES)} or a tool, got {choice!r}")
        return pb.ToolChoice(mode=f"MODE_{choice.upper()}")
    return pb.ToolChoice(name=_function(choice)["name"])


def _tool_call(call: Mapping[str, Any]) -> pb.ToolCall:
    if custom := call.get("custom"):  # the call of a tool with free-form input
        call = {**call, "function": {**custom, "arguments": {"input": custom.get("input") or ""}}}
    function = _function(call)
    arguments = function.get("arguments") or ""
    return pb.ToolCall(
        id=call.get("id") or "",
        name=function["name"],
        arguments=arguments if isinstance(arguments, str) else json.dumps(arguments),
    )


def _function(item: Mapping[str, Any]) -> Mapping[str, Any]:
    """The function of {"type": "function", "function": {...}}, or `item` if it has none."""
    found: Mapping[str, Any] = item.get("function", item)
    return found
