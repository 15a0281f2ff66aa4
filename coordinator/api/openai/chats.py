"""The body of /v1/chat/completions -> a request. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.api.openai.constraints import names_of, read_constraint
from coordinator.api.openai.decisions import CHAT_NEUTRAL, IGNORED
from coordinator.api.openai.errors import unsupported
from coordinator.api.openai.fields import UINT32, Fields, as_object
from coordinator.api.openai.messages import read_messages
from coordinator.api.openai.options import Wanted, read_common
from coordinator.api.validation.request import MAX_LOGPROBS
from coordinator.api.values import GenerateRequest, ToolChoice
from engine.base.errors import InvalidRequest

_MODES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class ChatCall:
    """What a client asked for."""

    request: GenerateRequest
    wanted: Wanted
    named_tool: bool  # a call of one named tool: such an answer ends with "stop"
    names: Mapping[str, str]  # of fields of the request, in the client's words


def read_chat(body: Mapping[str, Any], request_id: str) -> ChatCall:
    """Raises InvalidRequest, Refused."""
    fields = Fields(body)
    messages = read_messages(fields)
    limit = "max_completion_tokens"
    max_tokens = fields.integer(limit, 0, UINT32)
    old = fields.integer("max_tokens", 0, UINT32)
    if max_tokens is None:
        limit, max_tokens = "max_tokens", old
    common = read_common(fields, request_id, max_tokens=max_tokens, logprobs=_logprobs(fields))
    constraint, asked = read_constraint(fields)
    tools_json = read_tools(fields)
    choice = _tool_choice(fields)
    parallel = fields.boolean("parallel_tool_calls", True)
    fields.neutral({**CHAT_NEUTRAL, "best_of": (1, common.wanted.n)})
    fields.end(IGNORED)
    request = GenerateRequest(
        **common.request,
        request_id=common.wanted.request_id,
        messages=messages,
        constraint=constraint,
        tools_json=tools_json,
        tool_choice=choice,
        parallel_tool_calls=parallel,
    )
    names = {
        **names_of(asked or "tools"),  # which are a constraint, too
        "tools_json": "tools",
        "stop.max_tokens": limit,
        "output.logprobs": "top_logprobs",
        "output.prompt_logprobs": "prompt_logprobs",
        "tool_choice.name": "tool_choice.function.name",
    }
    return ChatCall(request, common.wanted, choice.name is not None, names)


def _logprobs(fields: Fields) -> int | None:
    """Alternatives wanted with each token; None: no log-probabilities."""
    wanted = fields.boolean("logprobs")
    top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top and not wanted:
        raise InvalidRequest("top_logprobs", "only for requests with logprobs: true")
    return (top or 0) if wanted else None


def read_tools(fields: Fields) -> str:
    """Tool definitions as they came; their content is the frontend's affair."""
    tools = fields.list("tools")
    if not tools:
        return ""
    for i, tool in enumerate(tools):
        kind = tool.get("type") if isinstance(tool, dict) else "function"
        if isinstance(kind, str) and kind != "function":
            raise unsupported(f"tools[{i}].type", kind[:40])
    return json.dumps(tools)


def _tool_choice(fields: Fields) -> ToolChoice:
    value = fields.take("tool_choice")
    if value is None:
        return ToolChoice()
    if isinstance(value, str):
        if value not in _MODES:
            raise InvalidRequest("tool_choice", "expected none, auto, required or a function")
        return ToolChoice(value)
    choice = as_object("tool_choice", value)
    kind = choice.text("type")
    if kind not in (None, "function"):
        raise unsupported("tool_choice.type", kind[:40])
    function = choice.object("function")
    name = function.text("name") if function else None
    if not name:
        raise InvalidRequest("tool_choice.function.name", "unset; expected the name of a tool")
    return ToolChoice(name=name)
