"""The API as OpenAPI describes it, for tools, and the same as a page, /docs.

docs/api.md is for people. Bodies come from models.py: what is accepted and does nothing is left
out. The page has no scripts and loads nothing, and its policy forbids the browser to do either.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment
from markupsafe import Markup
from starlette.responses import Response

from coordinator.api.openai import models
from coordinator.api.openai.read import Schema, schemas

_TEXT: Schema = {"type": "string"}
_OR_NULL: Schema = {"anyOf": [_TEXT, {"type": "null"}]}
_FIELDS = {"message": _TEXT, "type": _TEXT, "param": _OR_NULL, "code": _OR_NULL}
_STYLE = """
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
summary { cursor: pointer; padding: .4rem 0; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem; }
tr { border-bottom: 1px solid #8884; }
"""
_HASH = b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": (
        f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
}


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
        models.CompletionBody,
        models.ChatBody,
        models.TokenizeText,
        models.TokenizeChat,
        models.DetokenizeBody,
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


@cache
def _template() -> Any:
    source = files(__package__ or "").joinpath("docs.html").read_text(encoding="utf-8")
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)


def page(description: Mapping[str, Any]) -> Response:
    """The page of an OpenAPI `description`."""
    html = _template().render(**description, style=Markup(_STYLE))
    return Response(html, headers=_HEADERS)
