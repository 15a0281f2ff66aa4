"""A JSON object -> a model of models.py, or an error that names the option in the client's words.

msgspec checks. The text of an error is written from the schema of the same declaration:

    "Expected `int` >= 0 - at `$.stop_token_ids[1]`"
        --> InvalidRequest("stop_token_ids[1]", "-1; expected 0 to 4294967295")
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec

from coordinator.api.openai.errors import unknown_parameter, unsupported
from engine.base.errors import DiptychError, InvalidRequest

Schema = dict[str, Any]
Body = TypeVar("Body", bound=msgspec.Struct)

_PATH = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")
_REF = "#/components/schemas/{name}"
_NAMES = {
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "array": "an array",
    "object": "an object",
}
_EXPECTED = {
    "response_format.type": "expected text, json_object or json_schema",
    "response_format.json_schema": "unset; expected a schema and its name",
}
# Types of response_format that exist elsewhere.
_OTHER_FORMATS = ("structural_tag", "grammar", "python")


def read(model: type[Body], values: Mapping[str, Any]) -> Body:
    """`values` as a `model`; a whole number may be written as 3.0.

    Raises InvalidRequest, Refused.
    """
    try:
        return msgspec.convert(values, model)
    except msgspec.ValidationError:
        plain = {key: _plain(value) for key, value in values.items()}
        try:
            return msgspec.convert(plain, model)
        except msgspec.ValidationError as error:
            raise _refusal(model, plain, str(error)) from None


def check_rest(
    model: type[msgspec.Struct],
    values: Mapping[str, Any],
    neutral: Mapping[str, Collection[Any]],
    ignored: Collection[str],
    *,
    nulls: bool = False,
) -> None:
    """Refuse options outside `model`: unknown ones, and `neutral` ones at values with an effect.

    With `nulls` an option that is null is as good as unset. Raises Refused.
    """
    for key, value in values.items():
        if key in model.__struct_fields__ or key in ignored:
            continue
        if key in neutral:
            if value is not None and not any(_same(value, one) for one in neutral[key]):
                raise unsupported(key, "this option")
        elif value is not None or not nulls:
            raise unknown_parameter(key[:200])


def _same(value: Any, other: Any) -> bool:
    """Equal, and not by Python's notion that true is 1."""
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _plain(value: Any, depth: int = 2) -> Any:
    """Integral floats as integers, in lists of lists of them too."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list) and depth:
        return [_plain(item, depth - 1) for item in value]
    return value


@cache
def schemas(*models: type[msgspec.Struct]) -> tuple[list[Schema], dict[str, Schema]]:
    """OpenAPI schemas of `models`, and those that they refer to by name."""
    tops, parts = msgspec.json.schema_components(models, ref_template=_REF)
    shown = {name: _shown(part) for name, part in parts.items()}
    return [shown.pop(top["$ref"].rpartition("/")[2]) for top in tops], shown


def _shown(node: Any) -> Any:
    """A schema without null, which is the same as unset, and without what does nothing."""
    if isinstance(node, list):
        return [_shown(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: _shown(value) for key, value in node.items() if key != "default" or value}
    if "properties" in node:
        node["properties"] = {
            name: part
            for name, part in node["properties"].items()
            if not part.get("ignored") and part.get("type") != "null"
        }
    branches = [branch for branch in node.get("anyOf", ()) if branch != {"type": "null"}]
    if len(branches) == 1:
        del node["anyOf"]
        return {**branches[0], **node}
    return {**node, "anyOf": branches} if branches else node


def _refusal(model: type[msgspec.Struct], body: Any, error: str) -> DiptychError:
    """The error for `body`, from the text of msgspec's."""
    what, _, where = error.partition(" - at `$")
    (node,), parts = schemas(model)
    path, value = "", body
    for name, index in _PATH.findall(where):
        if index and _is_of_texts(node):  # the whole of it is named
            break
        key: str | int = name or index
        if index == "...":  # msgspec names no key of an object of numbers
            key = next(k for k, v in value.items() if not _is_number(v))
        elif index:
            key = int(index)
        path += f"[{str(key)[:20]}]" if index else f".{key}" if path else name
        node, value = _inner(node, key, parts), value[key]
    if missing := re.search(r"missing required field `(\w+)`", what):
        path = f"{path}.{missing[1]}" if path else missing[1]
        node, value = _inner(node, missing[1], parts), None
    elif unknown := re.search(r"unknown field `(.*)`", what, re.DOTALL):
        return unknown_parameter(f"{path}.{unknown[1]}"[:200])
    if what == "Expected `null`" or what.startswith("Expected `null`,"):
        return unsupported(path, "this option")
    if path == "response_format.type" and value in _OTHER_FORMATS:
        return unsupported(path, value)
    if what == "Number out of range":
        return InvalidRequest(path, "expected a number of a size that a float can have")
    if path in _EXPECTED and (value is None or ("enum" in node and isinstance(value, str))):
        return InvalidRequest(path, _EXPECTED[path])
    return InvalidRequest(path, _expected(node, value, parts))


def out_of_range(value: int, low: int, high: int) -> str:
    """The text of an error for a whole number."""
    return f"{value if abs(value) < 10**30 else 'a huge number'}; expected {low} to {high}"


def _is_number(value: Any) -> bool:
    try:
        msgspec.convert(value, float)
    except msgspec.ValidationError:
        return False
    return True


def _branches(node: Schema, parts: Mapping[str, Schema]) -> Iterator[Schema]:
    """A schema, or all those that it allows."""
    if "$ref" in node:
        yield from _branches(parts[node["$ref"].rpartition("/")[2]], parts)
    for branch in node.get("anyOf", ()):
        yield from _branches(branch, parts)
    if "$ref" not in node and "anyOf" not in node:
        yield node


def _inner(node: Schema, key: str | int, parts: Mapping[str, Schema]) -> Schema:
    """The schema of what is under `key`."""
    for branch in _branches(node, parts):
        if isinstance(key, int) and "items" in branch:
            return dict(branch["items"])
        for inner in (branch.get("properties", {}).get(key), branch.get("additionalProperties")):
            if isinstance(inner, dict):
                return inner
    return {}


def _is_of_texts(node: Schema) -> bool:
    return any(
        branch.get("items") == {"type": "string"} for branch in (node, *node.get("anyOf", ()))
    )


def _expected(node: Schema, value: Any, parts: Mapping[str, Schema]) -> str:
    branches = list(_branches(node, parts))
    if branches[0].get("type") == "integer" and type(value) is int:
        return out_of_range(value, branches[0]["minimum"], branches[0]["maximum"])
    if "enum" in node and value is not None and not isinstance(value, str):
        return "expected text"
    if "description" in node and "title" not in node:
        return f"expected {node['description']}"
    types = dict.fromkeys(branch.get("type", "string") for branch in branches)
    return f"expected {' or '.join(_NAMES[kind] for kind in types)}"
