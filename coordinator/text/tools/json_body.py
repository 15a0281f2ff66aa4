"""A call whose arguments are a JSON object: {"name": "f", "arguments": {...}} and the like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.text.tools.cursor import Cursor, Reading
from coordinator.text.tools.format import Tool, Write


@dataclass(frozen=True, slots=True)
class JsonBody:
    """See Body. `note` may follow the arguments, and is skipped."""

    begin: str = '{"name": "'
    middle: str = '", "arguments": '
    end: str = "}"
    note: str = ""
    is_json: bool = True

    def write(self, arguments: str) -> str:
        """See Body."""
        return arguments

    def rules(self, index: int, schema: str, lark: Write) -> list[str]:
        """See Body."""
        return [f"args_{index}: %json {schema}"]

    def not_enforced(self, parameters: Mapping[str, Any]) -> str:
        """See Body."""
        return ""

    def read(self, cursor: Cursor, tool: Tool) -> Reading[bool]:
        """See Body."""
        cursor.arguments = yield from _read_object(cursor)
        if self.note:
            char = yield from cursor.next()
            cursor.again = char
            if char == self.note[0] and not (yield from cursor.read_literal(self.note)):
                return False
        return (yield from cursor.read_literal(self.end, holds=False))


def _read_object(cursor: Cursor) -> Reading[str]:
    """A JSON object, which ends with its last bracket; white space before it is skipped."""
    read: list[str] = []
    depth, in_string, is_escaped = 0, False, False
    while not read or depth > 0 or in_string:
        char = yield from cursor.next()
        if not depth and char.isspace():
            continue
        read.append(char)
        if in_string:
            in_string = is_escaped or char != '"'
            is_escaped = char == "\\" and not is_escaped
        elif char == '"':
            in_string = True
        elif char in "{[":
            depth += 1
        elif char in "}]":
            depth -= 1
    return "".join(read)
