"""A call whose arguments stand between tags: <parameter=city>Oslo</parameter> and the like.

Texts are written raw, other values as JSON; which one it is, the tool's schema tells. The grammar
wants the declared parameters in the order of the schema, as it does within JSON.

    key_begin KEY key_end value_begin VALUE value_end after
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from coordinator.text.tools.cursor import Cursor, Reading, filled, fixed_parts, regex_of
from coordinator.text.tools.format import Tool, Write
from coordinator.text.tools.typed_values import (
    as_object,
    kinds_of,
    number_rule,
    plain_json,
    properties_of,
    type_of,
    typed,
    untyped_keyword,
)

_KEY = "/[A-Za-z0-9_.-]{1,64}/"
_ANY = {"string", "object"}
_STYLE = "x-guidance"


@dataclass(frozen=True, slots=True)
class TaggedBody:
    """See Body. `value_end` may contain {key}, and `value_begin` the place {type}."""

    begin: str
    middle: str
    end: str
    key_begin: str
    key_end: str
    value_end: str
    value_begin: str = ""
    newlines: bool = False  # one before and one after each value
    after: str = "\n"  # each argument
    types: Mapping[str, str] = field(default_factory=dict)  # of {type}, by JSON type
    is_json: bool = False

    def write(self, arguments: str) -> str:
        """See Body."""
        try:
            values = plain_json(arguments)
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):  # an example in a prompt
            values = {"<name>": arguments} if values is None else {}
        return "".join(self._written(key, value) for key, value in values.items())

    def _written(self, key: str, value: Any) -> str:
        kind = type_of(value)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        newline = "\n" if self.newlines else ""
        end = newline + self.value_end.replace("{key}", key) + self.after
        return self._head(key, kind) + newline + text + end

    def _head(self, key: str, kind: str) -> str:
        """What stands before a value of this JSON type."""
        value_begin = filled(self.value_begin, {"{type}": self.types.get(kind, kind)})
        return self.key_begin + key + self.key_end + value_begin

    def not_enforced(self, parameters: Mapping[str, Any]) -> str:
        """See Body."""
        return untyped_keyword(parameters)

    # -- grammar -----------------------------------------------------------------------------------

    def rules(self, index: int, schema: str, lark: Write) -> list[str]:
        """See Body."""
        root = json.loads(schema)
        properties = properties_of(root)
        if properties is None:
            return self._any_arguments(index, lark)
        required = root.get("required") or ()
        parts, rules = [], []
        for i, (key, of) in enumerate(properties.items()):
            if self.key_end in key:  # no reader could find its end
                continue
            name = f"{index}_{i}"
            parts.append(f"arg_{name}" + ("" if key in required else "?"))
            rules += self._argument(name, key, of, root, lark)
        return [f"args_{index}: {' '.join(parts)}" if parts else f'args_{index}: ""', *rules]

    def _any_arguments(self, index: int, lark: Write) -> list[str]:
        """Arguments of any names, as texts."""
        if "{key}" in self.value_end:  # a grammar cannot repeat a name
            return [f'args_{index}: ""']
        name, key_begin = f"{index}_any", self.key_begin
        key_end = self._head("", "string").removeprefix(key_begin)
        head = lark(key_begin), f"KEY_{name}", lark(key_end)
        parts = " ".join((*head, *self._newline(lark), f"raw_{name}", lark(self.after)))
        raw = self._raw(name, self.value_end, lark)
        return [f"args_{index}: arg_{name}*", f"arg_{name}: {parts}", f"KEY_{name}: {_KEY}", *raw]

    def _newline(self, lark: Write) -> Iterator[str]:
        if self.newlines:
            yield lark("\n")

    def _argument(
        self, name: str, key: str, schema: Mapping[str, Any], root: Mapping[str, Any], lark: Write
    ) -> list[str]:
        """The rules of one argument."""
        kinds = kinds_of(schema, root, _ANY)
        value_end = self.value_end.replace("{key}", key)
        tail = lark(("\n" if self.newlines else "") + value_end)
        kind = "string" if "string" in kinds else min(kinds, default="object")
        start = " ".join((lark(self._head(key, kind)), *self._newline(lark)))
        begin, end = f"arg_{name}: {start}", lark(self.after)
        if texts := _texts(schema):
            choice = " | ".join(map(json.dumps, texts))
            return [f"{begin} ({choice}) {tail} {end}"]
        if "string" in kinds:
            return [f"{begin} raw_{name} {end}", *self._raw(name, value_end, lark)]
        if number := number_rule(schema, kinds):
            return [f"{begin} NUMBER_{name} {tail} {end}", f"NUMBER_{name}: {number}"]
        return [f"{begin} json_{name} {tail} {end}", f"json_{name}: %json {_part(schema, root)}"]

    def _raw(self, name: str, value_end: str, lark: Write) -> list[str]:
        """A rule of raw text up to the end of a value."""
        written = lark(value_end)
        if not written.startswith("<["):
            end = json.dumps(("\n" if self.newlines else "") + value_end)
            return [f"raw_{name}[lazy]: /(?s:.*)/ {end}"]
        # The text, with its line breaks, must not spell the end: readers could not tell it from
        # the tokens.
        spelled = f"/(?s:.*){regex_of(value_end)}(?s:.*)/"
        return [f"raw_{name}: TEXT_{name}? {written}", f"TEXT_{name}: /(?s:.+)/ & ~{spelled}"]

    # -- reader ------------------------------------------------------------------------------------

    def read(self, cursor: Cursor, tool: Tool) -> Reading[bool]:
        """See Body."""
        root, values = tool.parameters, dict[str, str]()
        properties = root.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        while True:
            cursor.arguments, cursor.held = as_object(values), ""
            found = yield from cursor.read_one_of((fixed_parts(self.key_begin)[0], self.end))
            if found != 0:
                return found == 1
            cursor.arguments = None
            key = (yield from cursor.read_until(self.key_end)).strip()
            yield from cursor.read_literal(self.value_begin)
            text = yield from cursor.read_until(self.value_end.replace("{key}", key))
            if self.newlines:
                text = text.removeprefix("\n").removesuffix("\n")
            values[key] = typed(text, properties.get(key), root)


def _texts(schema: Mapping[str, Any]) -> list[str]:
    """The texts that a schema lists, if it lists nothing else."""
    listed = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        return []
    return listed


def _part(schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """A property's schema, with what it may refer to."""
    shared = {key: root[key] for key in ("$defs", "definitions", _STYLE) if key in root}
    return json.dumps({**schema, **shared})
