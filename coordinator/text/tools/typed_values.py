"""Values that a model writes as text, typed by the schema of their tool.

Forms with tags write texts raw and other values as JSON, so only the schema tells "5" from 5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
_MAX_DEPTH = 16  # of references and alternatives
# Keywords of an object that say nothing about its values.
_PLAIN = frozenset(
    (
        *("type", "properties", "required", "additionalProperties", "title", "description"),
        *("default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id"),
        *("$comment", "$defs", "definitions", "x-guidance"),
    )
)
# As many digits as in JSON (engine/constraints/numbers.py).
_NUMBERS = {
    "number": r"/-?(0|[1-9][0-9]{0,19})(\.[0-9]{1,24})?([eE][+-]?[0-9]{1,3})?/",
    "integer": "/-?(0|[1-9][0-9]{0,19})/",
}
_RANGES = (
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "enum", "const"),
    *("$ref", "anyOf", "oneOf", "allOf", "not"),
)
_UNTYPED = ("pattern", "minLength", "maxLength", "format")


def properties_of(schema: Mapping[str, Any]) -> dict[str, Mapping[str, Any]] | None:
    """The schemas of an object's properties, required ones without a schema too.

    None: the object may have any properties.
    """
    listed = schema.get("properties")
    found = dict(listed) if isinstance(listed, Mapping) else {}
    required = schema.get("required")
    for name in required if isinstance(required, list) else ():
        found.setdefault(name, {})
    if not found and schema.get("additionalProperties") is not False:
        return None
    if any(key not in _PLAIN for key in schema):  # combined from other schemas
        return None
    return {name: of if isinstance(of, Mapping) else {} for name, of in found.items()}


def untyped_keyword(schema: Mapping[str, Any]) -> str:
    """A keyword that forms with raw texts cannot enforce; "": none is in the way."""
    if other := [key for key in schema if key not in _PLAIN]:
        return other[0]
    found = properties_of(schema)
    if found is None:
        return "additionalProperties"
    for name, of in found.items():
        if "string" in kinds_of(of, schema, {"string"}) and (
            keys := [key for key in _UNTYPED if key in of]
        ):
            return f"properties.{name}.{keys[0]}"
    return ""


def may_be_text(schema: Mapping[str, Any]) -> bool:
    """Whether a value of an object with this schema may be a text."""
    found = properties_of(schema)
    texts = {"string"}
    return found is None or any(texts & kinds_of(of, schema, texts) for of in found.values())


def kinds_of(
    schema: Any, root: Mapping[str, Any], default: set[str], depth: int = _MAX_DEPTH
) -> set[str]:
    """The JSON types that a schema allows; `default` where it does not name them."""
    if not isinstance(schema, Mapping) or not depth:
        return default
    if isinstance(reference := schema.get("$ref"), str):
        return kinds_of(_resolved(reference, root), root, default, depth - 1)
    if isinstance(schema.get("enum"), list):
        return {type_of(value) for value in schema["enum"]}
    if "const" in schema:
        return {type_of(schema["const"])}
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {one for one in kind if isinstance(one, str)}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            found = [kinds_of(one, root, default, depth - 1) for one in schema[key]]
            return set().union(*found)
    return default


def _resolved(reference: str, root: Mapping[str, Any]) -> Any:
    value: Any = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def type_of(value: Any) -> str:
    """The JSON type of a value."""
    return _TYPES.get(type(value), "array" if isinstance(value, list) else "object")


def plain_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, RecursionError; also for NaN and infinity."""
    value = json.loads(text, parse_constant=_refuse)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("not finite")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def typed(text: str, schema: Mapping[str, Any] | None, root: Mapping[str, Any]) -> str:
    """The JSON of a value that was written as `text`."""
    every = set(_TYPES.values()) | {"array", "object"}
    kinds = kinds_of(schema, root, every)
    if kinds != {"string"}:
        try:
            kind = type_of(plain_json(text))
        except (ValueError, RecursionError):
            kind = "string"
        if kind != "string" and (kind in kinds or (kind == "integer" and "number" in kinds)):
            return text.strip()
        if kind == "string" and "string" not in kinds and text.strip() in ("True", "False"):
            return text.strip().lower()  # as models trained on Python write it
        if kind == "string" and "null" in kinds and text.strip() == "None":
            return "null"
    return json.dumps(text, ensure_ascii=False)


def number_rule(schema: Mapping[str, Any], kinds: set[str]) -> str:
    """A regular expression of bounded numbers; "": the schema wants more than any number."""
    if not kinds or not kinds <= _NUMBERS.keys() or any(key in schema for key in _RANGES):
        return ""
    return _NUMBERS["number" if "number" in kinds else "integer"]


def as_object(values: Mapping[str, str]) -> str:
    """A JSON object of values that are JSON."""
    pairs = (f"{json.dumps(name, ensure_ascii=False)}: {value}" for name, value in values.items())
    return "{" + ", ".join(pairs) + "}"
