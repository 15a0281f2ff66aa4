"""What a caller says: a prompt or a conversation, and options by name -> a request.

Options are the fields of Sampling, Stop, Output and Constraint and a few of the request itself, by
the names that inference.proto gives them. One that is unknown, or a second constraint, is refused
here; values are checked by the coordinator, which names the field.
"""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coordinator.client import chat_messages as chat_messages
from engine.pb.diptych.v1 import inference_pb2

_PARTS: dict[str, Any] = {
    "sampling": inference_pb2.Sampling,
    "stop": inference_pb2.Stop,
    "output": inference_pb2.Output,
    "constraint": inference_pb2.Constraint,
}
_PART_OF = {field.name: part for part, of in _PARTS.items() for field in of.DESCRIPTOR.fields}
_PLAIN = frozenset(("request_id", "model", "n", "priority", "cache_salt"))

Request = inference_pb2.GenerateRequest | inference_pb2.ChatRequest


def generate_request(prompt: str | Sequence[int], **options: Any) -> inference_pb2.GenerateRequest:
    """A request for text or token ids."""
    common = _common(options)
    if isinstance(prompt, str):
        return inference_pb2.GenerateRequest(text=prompt, **common)
    ids = inference_pb2.TokenIds(ids=prompt)
    return inference_pb2.GenerateRequest(token_ids=ids, **common)


def chat_request(
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool | None = None,
    **options: Any,
) -> inference_pb2.ChatRequest:
    """A request for the next turn; messages, tools and choice as OpenAI's API has them."""
    return inference_pb2.ChatRequest(
        messages=map(chat_messages.message, messages),
        tools_json=json.dumps(list(tools)) if tools else None,
        tool_choice=chat_messages.tool_choice(tool_choice),
        parallel_tool_calls=parallel_tool_calls,
        **_common(options),
    )


def give_name(request: Request) -> None:
    """An id if it has none: an unset seed is a hash of it, so that all its calls bring the same."""
    if not request.request_id:
        request.request_id = uuid.uuid4().hex


def resumed(request: Request, delivered: Iterable[inference_pb2.Resume | None]) -> Request:
    """The same request, with what is already delivered of its choices."""
    again = copy.deepcopy(request)
    again.resume.extend(resume for resume in delivered if resume)
    return again


def _common(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword options, None left out, sorted into the messages that they belong to."""
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := given.keys() - _PART_OF.keys() - _PLAIN:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}")
    fields: dict[str, Any] = {key: given.pop(key) for key in _PLAIN & given.keys()}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in given.items():
        if key != "json_object" or value:  # a constraint that is off is none
            parts.setdefault(_PART_OF[key], {})[key] = _as_field(key, value)
    constraints = parts.get("constraint", {})
    if len(constraints) > 1:
        raise TypeError(f"more than one constraint: {' and '.join(constraints)}")
    return fields | {part: _PARTS[part](**given) for part, given in parts.items()}


def _as_field(key: str, value: Any) -> Any:
    """What Python says more shortly than the protocol."""
    if key == "stop":
        return [value] if isinstance(value, str) else value
    if key == "json_schema":
        return value if isinstance(value, str) else json.dumps(value)
    if key == "choice":
        return inference_pb2.Choices(choices=[value] if isinstance(value, str) else value)
    return value
