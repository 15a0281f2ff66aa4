"""The API as OpenAPI describes it, for tools; docs/api.md is for people.

Bodies come from models.py: what is accepted and does nothing is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordinator.api.openai.models import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeChat,
    TokenizeText,
)
from coordinator.api.openai.read import Schema, schemas

_TEXT: Schema = {"type": "string"}
_OR_NULL: Schema = {"anyOf": [_TEXT, {"type": "null"}]}
_FIELDS = {"message": _TEXT, "type": _TEXT, "param": _OR_NULL, "code": _OR_NULL}


def _object(properties: Mapping[str, Schema]) -> Schema:
    return {"type": "object", "properties": properties, "required": [*properties]}


def _json(schema: Schema) -> Schema:
    return {"content": {"application/json": {"schema": schema}}}


def _operation(summary: str, body: Schema | None = None, streams: bool = False) -> Schema:
    good: Schema = {"description": "the answer", **_json({"type": "object"})}
    if streams:
        good["content"]["text/event-stream"] = {"schema": _TEXT}
    error = {"description": "an error", **_json({"$ref": "#/components/schemas/Error"})}
    operation: Schema = {"summary": summary, "responses": {"200": good, "default": error}}
    if body is not None:
        operation["requestBody"] = {"required": True, **_json(body)}
    return operation


def description(version: str) -> dict[str, Any]:
    """The whole description."""
    (completion, chat, text, turns, tokens), parts = schemas(
        CompletionBody, ChatBody, TokenizeText, TokenizeChat, DetokenizeBody
    )
    name = {"name": "model", "in": "path", "required": True, "schema": _TEXT}
    tokenize = {"anyOf": [text, turns]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Diptych", "version": version},
        "paths": {
            "/v1/completions": {"post": _operation("Complete a prompt", completion, True)},
            "/v1/chat/completions": {"post": _operation("Answer a conversation", chat, True)},
            "/v1/models": {"get": _operation("The models")},
            "/v1/models/{model}": {"parameters": [name], "get": _operation("One model")},
            "/tokenize": {"post": _operation("Token ids of a text or conversation", tokenize)},
            "/detokenize": {"post": _operation("The text of token ids", tokens)},
            "/version": {"get": _operation("The server's version")},
        },
        "components": {"schemas": {**parts, "Error": _object({"error": _object(_FIELDS)})}},
    }
