"""The check of tools: definitions, choices and earlier calls, or an error that names the field.

Pure. A part of request.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from coordinator.api.validation.bounds import check_count
from coordinator.api.values import Constraint, GenerateRequest
from coordinator.text import json_bounds as nesting
from coordinator.text.tools.format import (
    NO_PARAMETERS,
    Tool,
    ToolFormat,
    ToolUse,
    argument_schema,
)
from coordinator.text.values import ToolCall
from engine.base.errors import InvalidRequest, NotOffered
from engine.constraints.grammar import MAX_SOURCE_CHARS
from engine.constraints.schema_context import UnsupportedSchema
from engine.constraints.schemas import prepare_schema

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 1024 * 1024
TOOL_MODES = ("", "none", "auto", "required")
UNPARSED = "unparsed"  # the name under which arguments stand that are no object
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # of a tool
_OTHER_TYPES = ("null", "boolean", "integer", "number", "string", "array")


def check_tools(field: str, source: str) -> tuple[Tool, ...]:
    """Tool definitions out of a JSON array of them; an empty text or array is none."""
    if not source:
        return ()
    if len(source) > MAX_TOOLS_BYTES:
        raise InvalidRequest(field, f"longer than {MAX_TOOLS_BYTES} characters")
    listed = parse_json(field, source)
    if listed is None:
        return ()
    if not isinstance(listed, list):
        raise InvalidRequest(field, "expected a JSON array of tool definitions")
    check_count(field, len(listed), MAX_TOOLS, "tools")
    tools: list[Tool] = []
    for i, item in enumerate(listed):
        tool = _tool(f"{field}[{i}]", item)
        if any(other.name == tool.name for other in tools):
            raise InvalidRequest(f"{field}[{i}].function.name", f"{tool.name!r} stands there twice")
        tools.append(tool)
    return tuple(tools)


def tool_use(request: GenerateRequest, tools: tuple[Tool, ...], form: ToolFormat) -> ToolUse | None:
    """The tools that an output may or must call; None: it is text, and the prompt names none."""
    name, mode = request.tool_choice.name, request.tool_choice.mode
    if mode not in TOOL_MODES:
        raise InvalidRequest("tool_choice.mode", f"{mode} is not known")
    if not tools:  # "auto" and "none" then mean text
        if name is not None or mode == "required":
            raise InvalidRequest("tool_choice", "there are no tools to choose from")
        return None
    if form.is_unknown and (name is not None or mode == "required"):
        raise InvalidRequest(
            "tool_choice",
            "the form in which this model writes calls is not known, so the answer can only be"
            " text; expected auto or none, or a server with --tool-format",
        )
    if name is not None:
        named = tuple(tool for tool in tools if tool.name == name)
        if not named:
            known = ", ".join(tool.name for tool in tools)
            raise InvalidRequest("tool_choice.name", f"is none of the tools: {known}")
        return ToolUse(form, tools, named, required=True, single=True)
    if mode == "none":
        return None
    single = form.single or not request.parallel_tool_calls
    callable_tools = () if form.is_unknown else tools
    return ToolUse(form, tools, callable_tools, required=mode == "required", single=single)


def check_enforced(field: str, use: ToolUse) -> None:
    """Raise InvalidRequest for a strict tool that the model's form of calls cannot enforce."""
    for tool in use.callable:
        if tool.strict and (keyword := use.format.body.not_enforced(tool.parameters)):
            where = f"{field}[{use.tools.index(tool)}].function.parameters"
            what = f"{keyword} cannot be enforced in the form {use.format.name}"
            raise InvalidRequest(where, f"{what}; expected strict: false")


def text_schema(constraint: Constraint | None, use: ToolUse) -> str | None:
    """The JSON schema for text without a call, or None."""
    if constraint is None or use.required:  # an output of calls has no text
        return None
    kind, value = constraint.kind, constraint.value
    if not use.format.trigger and use.callable:
        raise NotOffered(f"constraint.{kind} beside tools, with a model whose calls are bare JSON")
    if kind == "json_object":
        return prepare_schema('{"type": "object"}') if value else None
    if kind != "json_schema" or not isinstance(value, str):
        raise NotOffered(f"constraint.{kind} beside tools")
    schema = parse_json("constraint.json_schema", value)
    if not isinstance(schema, dict):
        raise InvalidRequest("constraint.json_schema", "expected a JSON object")
    return _fitting("constraint.json_schema", partial(prepare_schema, json.dumps(schema)))


def check_tool_calls(
    field: str, calls: Sequence[ToolCall], items: nesting.Items | None = None
) -> tuple[ToolCall, ...]:
    """Calls of an earlier turn. Templates get their arguments as objects.

    `items` bounds the values in all JSON of the conversation.
    """
    items = items or nesting.Items()
    checked = []
    for i, call in enumerate(calls):
        if not call.name:
            raise InvalidRequest(f"{field}[{i}].name", "empty; expected the name of a tool")
        source = str(call.arguments)
        arguments = _arguments(source) if items.take(source) else {UNPARSED: source}
        checked.append(ToolCall(call.id, call.name, arguments))
    return tuple(checked)


def _arguments(source: str) -> Mapping[str, Any]:
    """Arguments as an object, since templates iterate over its items.

    A call that the length limit cut off stays in its conversation, so nothing is refused here. An
    empty text, null and [] are no arguments. Any other value, text that is not JSON, and JSON that
    exceeds the bounds become the one argument `UNPARSED`.
    """
    try:
        value = parse_json("", source) if source.strip() else {}
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (InvalidRequest, ValueError, RecursionError):  # no JSON, 1e999, half a character
        value = source
    if isinstance(value, dict):
        return value
    return {UNPARSED: value} if value not in (None, []) else {}


def parse_json(field: str, source: str) -> Any:
    """The value of a JSON text. Raises InvalidRequest naming `field`."""
    try:
        return nesting.loads(source)
    except json.JSONDecodeError as error:
        raise InvalidRequest(field, f"not JSON: {error.msg} at character {error.pos}") from None
    except ValueError as error:
        what = str(error)
        bounds = (nesting.TOO_DEEP, nesting.TOO_MANY)
        raise InvalidRequest(field, what if what in bounds else f"not JSON: {what}") from None


def _tool(field: str, item: Any) -> Tool:
    if not isinstance(item, dict):
        raise InvalidRequest(field, "expected an object")
    if item.get("type") != "function":
        raise InvalidRequest(f"{field}.type", 'expected "function"')
    function = item.get("function")
    if not isinstance(function, dict):
        raise InvalidRequest(f"{field}.function", "expected an object")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InvalidRequest(
            f"{field}.function.name", "expected 1 to 64 letters, digits, underscores, dots, dashes"
        )
    for key, kind in (("description", str), ("strict", bool), ("parameters", dict)):
        if function.get(key) is not None and not isinstance(function[key], kind):
            expected = {str: "text", bool: "true or false", dict: "a JSON schema, an object"}[kind]
            raise InvalidRequest(f"{field}.function.{key}", f"expected {expected}")
    strict = function.get("strict") is True
    parameters = function.get("parameters") or NO_PARAMETERS
    kinds = parameters.get("type", "object")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if "object" not in kinds and (strict or any(kind in _OTHER_TYPES for kind in kinds)):
        raise InvalidRequest(
            f"{field}.function.parameters.type", 'expected "object": arguments have names'
        )
    parameters = {**parameters, "type": "object"}  # also where the schema has no type
    make = partial(argument_schema, parameters, strict)
    schema = _fitting(f"{field}.function.parameters", make)
    return Tool(name, definition=item, schema=schema, strict=strict)


def _fitting(field: str, make: Callable[[], str]) -> str:
    """A schema that is made for a grammar. Raises InvalidRequest naming `field`."""
    try:
        source = make()
        if len(source) > MAX_SOURCE_CHARS:
            raise UnsupportedSchema(f"longer than {MAX_SOURCE_CHARS} characters")
        return source
    except (ValueError, RecursionError) as error:  # JSON cannot write 1e999, read as infinity
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidRequest(field, what) from None
