"""The API in OpenAPI's words, for tools that read such descriptions; docs/api.md is for people.

Says what is accepted; what is accepted and does nothing is left out.
"""

from __future__ import annotations

from typing import Any

from coordinator.api.openai.completions import MAX_PROMPTS
from coordinator.api.openai.fields import UINT32
from coordinator.api.validation.request import MAX_CHOICES, MAX_LOGPROBS

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_BOOLEAN: Schema = {"type": "boolean"}
_NUMBER: Schema = {"type": "number"}
_COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": UINT32}
_LOGPROBS: Schema = {"type": "integer", "minimum": 0, "maximum": MAX_LOGPROBS}
_TOKENS: Schema = {"type": "array", "items": _COUNT}
_TEXTS: Schema = {"type": "array", "items": _TEXT}
_OBJECT: Schema = {"type": "object"}


def _object(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required}


_RESPONSE_FORMAT = _object(
    ["type"],
    type={"enum": ["text", "json_object", "json_schema"]},
    json_schema=_object([], name=_TEXT, description=_TEXT, strict=_BOOLEAN, schema=_OBJECT),
)
_STRUCTURED = _object(
    [], json=_OBJECT, regex=_TEXT, choice=_TEXTS, grammar=_TEXT, json_object=_BOOLEAN
)
_COMMON: dict[str, Schema] = {
    "model": _TEXT,
    "n": {"type": "integer", "minimum": 1, "maximum": MAX_CHOICES},
    "stream": _BOOLEAN,
    "stream_options": _object([], include_usage=_BOOLEAN, continuous_usage_stats=_BOOLEAN),
    "temperature": {"type": "number", "minimum": 0},
    "top_p": {"type": "number", "minimum": 0, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1, "maximum": UINT32},
    "min_p": {"type": "number", "minimum": 0, "maximum": 1},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "repetition_penalty": {"type": "number", "minimum": 0.001, "maximum": 1000},
    "seed": {"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1},
    "logit_bias": {"type": "object", "additionalProperties": _NUMBER},
    "stop": {"anyOf": [_TEXT, _TEXTS]},
    "stop_token_ids": _TOKENS,
    "min_tokens": _COUNT,
    "ignore_eos": _BOOLEAN,
    "include_stop_str_in_output": _BOOLEAN,
    "skip_special_tokens": _BOOLEAN,
    "prompt_logprobs": _LOGPROBS,
    "response_format": _RESPONSE_FORMAT,
    "structured_outputs": _STRUCTURED,
    "guided_json": {"anyOf": [_OBJECT, _TEXT]},
    "guided_regex": _TEXT,
    "guided_choice": _TEXTS,
    "guided_grammar": _TEXT,
    "priority": {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1},
    "cache_salt": {"type": "string", "minLength": 1, "maxLength": 1024},
    "request_id": {"type": "string", "maxLength": 128},
    "return_token_ids": _BOOLEAN,
    "return_tokens_as_token_ids": _BOOLEAN,
    "user": _TEXT,
    "metadata": _OBJECT,
}
_COMPLETION: Schema = _object(
    ["prompt"],
    prompt={
        "anyOf": [
            _TEXT,
            {**_TEXTS, "minItems": 1, "maxItems": MAX_PROMPTS},
            {**_TOKENS, "minItems": 1},
            {"type": "array", "items": _TOKENS, "minItems": 1, "maxItems": MAX_PROMPTS},
        ]
    },
    max_tokens=_COUNT,
    echo=_BOOLEAN,
    logprobs=_LOGPROBS,
    **_COMMON,
)
_PART = _object(["type", "text"], type={"enum": ["text"]}, text=_TEXT)
_CALL = _object(
    ["function"],
    id=_TEXT,
    type={"enum": ["function"]},
    function=_object(["name", "arguments"], name=_TEXT, arguments=_TEXT),
)
_MESSAGES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": _object(
        ["role"],
        role={"enum": ["system", "developer", "user", "assistant", "tool", "function"]},
        content={"anyOf": [_TEXT, {"type": "array", "items": _PART}, {"type": "null"}]},
        name=_TEXT,
        tool_calls={"type": "array", "items": _CALL},
        tool_call_id=_TEXT,
    ),
}
_TOOLS: Schema = {
    "type": "array",
    "maxItems": 128,
    "items": _object(
        ["type", "function"],
        type={"enum": ["function"]},
        function=_object(
            ["name"],
            name={"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
            description=_TEXT,
            parameters=_OBJECT,
            strict=_BOOLEAN,
        ),
    ),
}
_CHAT: Schema = _object(
    ["messages"],
    messages=_MESSAGES,
    max_completion_tokens=_COUNT,
    max_tokens=_COUNT,
    logprobs=_BOOLEAN,
    top_logprobs=_LOGPROBS,
    tools=_TOOLS,
    tool_choice={
        "anyOf": [
            {"enum": ["none", "auto", "required"]},
            _object(
                ["function"], type={"enum": ["function"]}, function=_object(["name"], name=_TEXT)
            ),
        ]
    },
    parallel_tool_calls=_BOOLEAN,
    **_COMMON,
)
_TOKENIZE: Schema = {
    "anyOf": [
        _object(["prompt"], model=_TEXT, prompt=_TEXT, add_special_tokens=_BOOLEAN),
        _object(
            ["messages"],
            model=_TEXT,
            messages=_MESSAGES,
            tools=_TOOLS,
            add_generation_prompt=_BOOLEAN,
        ),
    ]
}
_DETOKENIZE: Schema = _object(["tokens"], model=_TEXT, tokens=_TOKENS)
_ERROR: Schema = _object(
    ["error"],
    error=_object(
        ["message", "type", "param", "code"],
        message=_TEXT,
        type=_TEXT,
        param={"anyOf": [_TEXT, {"type": "null"}]},
        code={"anyOf": [_TEXT, {"type": "null"}]},
    ),
)


def _json(schema: Schema) -> Schema:
    return {"content": {"application/json": {"schema": schema}}}


def _operation(summary: str, body: Schema | None = None, streams: bool = False) -> Schema:
    good: Schema = {"description": "the answer", **_json(_OBJECT)}
    if streams:
        good["content"]["text/event-stream"] = {"schema": _TEXT}
    operation: Schema = {
        "summary": summary,
        "responses": {"200": good, "default": {"description": "an error", **_json(_ERROR)}},
    }
    if body is not None:
        operation["requestBody"] = {"required": True, **_json(body)}
    return operation


def description(version: str) -> Schema:
    """The whole description."""
    name = {"name": "model", "in": "path", "required": True, "schema": _TEXT}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Diptych", "version": version},
        "paths": {
            "/v1/completions": {"post": _operation("Complete a prompt", _COMPLETION, True)},
            "/v1/chat/completions": {"post": _operation("Answer a conversation", _CHAT, True)},
            "/v1/models": {"get": _operation("The models")},
            "/v1/models/{model}": {"parameters": [name], "get": _operation("One model")},
            "/tokenize": {"post": _operation("Token ids of a text or conversation", _TOKENIZE)},
            "/detokenize": {"post": _operation("The text of token ids", _DETOKENIZE)},
            "/version": {"get": _operation("The server's version")},
        },
    }
