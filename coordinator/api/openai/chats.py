"""The body of /v1/chat/completions -> a request. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from coordinator.api.openai.constraints import names_of, read_constraint
from coordinator.api.openai.decisions import CHAT_NEUTRAL
from coordinator.api.openai.errors import unsupported
from coordinator.api.openai.messages import read_messages
from coordinator.api.openai.models import ChatBody, NamedChoice
from coordinator.api.openai.options import Call, common_fields, read_body
from coordinator.api.values import GenerateRequest, ToolChoice
from engine.base.errors import InvalidRequest


def read_chat(values: Mapping[str, Any], request_id: str) -> Call:
    """Raises InvalidRequest, Refused."""
    body = read_body(ChatBody, values, CHAT_NEUTRAL)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs", "only for requests with logprobs: true")
    limit, max_tokens = "max_completion_tokens", body.max_completion_tokens
    if max_tokens is None:
        limit, max_tokens = "max_tokens", body.max_tokens
    constraint, option = read_constraint(body)
    choice = _tool_choice(body.tool_choice)
    request = GenerateRequest(
        **common_fields(body, max_tokens=max_tokens, logprobs=logprobs),
        request_id=request_id,
        messages=read_messages(body.messages, values["messages"]),
        constraint=constraint,
        tools_json=tools_json(body.tools),
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
    )
    names = {
        **names_of(option or "tools"),  # which are a constraint, too
        "tools_json": "tools",
        "stop.max_tokens": limit,
        "output.logprobs": "top_logprobs",
        "output.prompt_logprobs": "prompt_logprobs",
        "tool_choice.name": "tool_choice.function.name",
    }
    return Call(body, request_id, (request,), logprobs, names)


def tools_json(tools: Sequence[Any] | None) -> str:
    """Tool definitions as JSON; the frontend checks their content. Raises Refused."""
    for i, tool in enumerate(tools or ()):
        kind = tool.get("type") if isinstance(tool, dict) else "function"
        if isinstance(kind, str) and kind != "function":
            raise unsupported(f"tools[{i}].type", kind[:40])
    return json.dumps(tools) if tools else ""


def _tool_choice(choice: str | NamedChoice | None) -> ToolChoice:
    if not isinstance(choice, NamedChoice):
        return ToolChoice(choice or "")
    if choice.type not in (None, "function"):
        raise unsupported("tool_choice.type", choice.type[:40])
    if not choice.function or not choice.function.name:
        raise InvalidRequest("tool_choice.function.name", "unset; expected the name of a tool")
    return ToolChoice(name=choice.function.name)
