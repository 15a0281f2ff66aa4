"""Builds requests from a prompt or a conversation, and options by name.

Options are the fields of Sampling, Stop, Output and Constraint, and a few of the request, with
their names in inference.proto. Unknown options and a second constraint are refused here; the
coordinator checks values and names the field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.client import chat_messages
from engine.pb.diptych.v1 import inference_pb2 as pb

_PARTS: dict[str, Any] = {
    "sampling": pb.Sampling,
    "stop": pb.Stop,
    "output": pb.Output,
    "constraint": pb.Constraint,
}
_PART_OF = {field.name: part for part, of in _PARTS.items() for field in of.DESCRIPTOR.fields}
_PLAIN = frozenset(("request_id", "model", "n", "priority", "cache_salt"))

Request = pb.GenerateRequest | pb.ChatRequest


def generate_request(prompt: str | Sequence[int], **options: Any) -> pb.GenerateRequest:
    """A request with a prompt of text or token ids. Raises TypeError for unknown options."""
    common = _common(options)
    if isinstance(prompt, str):
        return pb.GenerateRequest(text=prompt, **common)
    ids = pb.TokenIds(ids=prompt)
    return pb.GenerateRequest(token_ids=ids, **common)


def chat_request(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> pb.ChatRequest:
    """A request for the next message; messages, tools and choice are in OpenAI's form.

    Raises TypeError for unknown options, ValueError for messages of another form.
    """
    return pb.ChatRequest(
        messages=map(chat_messages.message, messages),
        tools_json=json.dumps(list(tools)) if tools else None,
        tool_choice=chat_messages.tool_choice(tool_choice),
        parallel_tool_calls=parallel_tool_calls,
        template_kwargs_json=json.dumps(dict(template_kwargs)) if template_kwargs else None,
        **_common(options),
    )


def _common(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request from keyword options; None counts as unset."""
    present = {key: value for key, value in options.items() if value is not None}
    if unknown := present.keys() - _PART_OF.keys() - _PLAIN:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}")
    fields: dict[str, Any] = {key: present.pop(key) for key in _PLAIN & present.keys()}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in present.items():
        if key != "json_object" or value:  # json_object=False is no constraint
            parts.setdefault(_PART_OF[key], {})[key] = _as_field(key, value)
    constraints = parts.get("constraint", {})
    if len(constraints) > 1:
        raise TypeError(f"more than one constraint: {' and '.join(constraints)}")
    return fields | {part: _PARTS[part](**values) for part, values in parts.items()}


def _as_field(key: str, value: Any) -> Any:
    """The protobuf value of an option; texts, lists and dicts are accepted for messages."""
    if key == "stop":
        return [value] if isinstance(value, str) else value
    if key == "json_schema":
        return value if isinstance(value, str) else json.dumps(value)
    if key == "choice":
        return pb.Choices(choices=[value] if isinstance(value, str) else value)
    return value
