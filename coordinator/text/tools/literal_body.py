"""A call whose arguments are literals of another language than JSON: of Python, or Gemma's.

python  f(city="Oslo", days=3, ok=True)
gemma   call:f{city:<|"|>Oslo<|"|>,days:3,ok:true}
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.text.tools.cursor import Cursor, Reading, regex_of
from coordinator.text.tools.format import Tool, Write
from coordinator.text.tools.typed_values import (
    kinds_of,
    number_rule,
    plain_json,
    properties_of,
    untyped_keyword,
)

_MAX_DEPTH = 32
_MAX_CHARS = 1 << 20  # of the arguments of a call
_QUOTES = ("'", '"')


@dataclass(frozen=True, slots=True)
class Language:
    """How values are written."""

    equals: str  # between a name and its value
    comma: str
    words: tuple[str, str, str]  # true, false, nothing
    quote: str = ""  # around a text, which has no escapes; "": a text of Python or JSON


PYTHON = Language("=", ", ", ("True", "False", "None"))
GEMMA = Language(":", ",", ("true", "false", "null"), quote='<|"|>')


@dataclass(frozen=True, slots=True)
class LiteralBody:
    """See Body."""

    begin: str
    middle: str  # ends with an opening bracket
    end: str  # begins with the closing one
    language: Language
    is_json: bool = False

    def write(self, arguments: str) -> str:
        """See Body."""
        try:
            values = plain_json(arguments)
        except (ValueError, RecursionError):
            return arguments  # an example in a prompt
        values = values if isinstance(values, dict) else {}
        equals = self.language.equals
        return self.language.comma.join(f"{k}{equals}{self._literal(v)}" for k, v in values.items())

    def _literal(self, value: Any) -> str:
        language = self.language
        if isinstance(value, str):
            return f"{language.quote}{value}{language.quote}" if language.quote else _quoted(value)
        if isinstance(value, dict):
            pairs = (f"{self._key(k)}:{self._space}{self._literal(v)}" for k, v in value.items())
            return "{" + language.comma.join(pairs) + "}"
        if isinstance(value, list):
            return "[" + language.comma.join(map(self._literal, value)) + "]"
        if value is None or isinstance(value, bool):
            return language.words[2 if value is None else int(not value)]
        return json.dumps(value)

    @property
    def _space(self) -> str:
        """What follows the colon within an object."""
        return self.language.comma[1:]

    def _key(self, key: str) -> str:
        return key if self.language.quote else _quoted(key)

    def not_enforced(self, parameters: Mapping[str, Any]) -> str:
        """See Body."""
        if keyword := untyped_keyword(parameters):
            return keyword
        for name, of in (properties_of(parameters) or {}).items():
            if not isinstance(of.get("type"), str) or of["type"] in ("array", "object"):
                return f"properties.{name}"
        return ""

    # -- grammar -----------------------------------------------------------------------------------

    def rules(self, index: int, schema: str, lark: Write) -> list[str]:
        """See Body."""
        root, language = json.loads(schema), self.language
        properties = properties_of(root)
        values = self._values(index, lark)
        comma = json.dumps(language.comma)
        if properties is None:
            name = f"NAME_{index} {json.dumps(language.equals)} any_{index}"
            return [
                f"args_{index}: ({name} ({comma} {name})*)?",
                f"NAME_{index}: /[A-Za-z_][A-Za-z0-9_]{{0,63}}/",
                *values,
            ]
        required = root.get("required") or ()
        rules = [f"args_{index}: tail_{index}_0_0"]
        for i, (key, of) in enumerate(properties.items()):
            value = self._value(index, of, root)
            argument = f"{json.dumps(key + language.equals)} {value} tail_{index}_{i + 1}_1"
            for has_before, before in enumerate(("", comma + " ")):
                skip = "" if key in required else f" | tail_{index}_{i + 1}_{has_before}"
                rules.append(f"tail_{index}_{i}_{has_before}: {before}{argument}{skip}")
        last = len(properties)
        return [*rules, *(f'tail_{index}_{last}_{n}: ""' for n in (0, 1)), *values]

    def _value(self, index: int, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        """The name of the rule of a property's values."""
        listed = schema.get("enum")
        if isinstance(listed, list) and listed and all(isinstance(one, str) for one in listed):
            return "(" + " | ".join(self._text_literal(one) for one in listed) + ")"
        names = {"string": "text", "integer": "INTEGER", "number": "NUMBER", "boolean": "BOOL"}
        kinds = kinds_of(schema, root, set())
        if not kinds or not kinds <= names.keys():
            return f"any_{index}"
        return "(" + " | ".join(f"{names[kind]}_{index}" for kind in sorted(kinds)) + ")"

    def _text_literal(self, text: str) -> str:
        return json.dumps(self._literal(text))

    def _values(self, index: int, lark: Write) -> list[str]:
        """The rules of values of any type."""
        language = self.language
        comma, colon = json.dumps(language.comma), json.dumps(":" + self._space)
        true, false, nothing = map(json.dumps, language.words)
        key, several = f"text_{index}", f"any_{index}"
        if language.quote:
            key = "/[A-Za-z0-9_]{1,64}/"
        return [
            f"any_{index}: text_{index} | NUMBER_{index} | BOOL_{index} | {nothing}"
            f" | list_{index} | object_{index}",
            f'list_{index}: "[" ({several} ({comma} {several})*)? "]"',
            f'object_{index}: "{{" (pair_{index} ({comma} pair_{index})*)? "}}"',
            f"pair_{index}: {key} {colon} {several}",
            f"NUMBER_{index}: {number_rule({}, {'number'})}",
            f"INTEGER_{index}: {number_rule({}, {'integer'})}",
            f"BOOL_{index}: {true} | {false}",
            *self._text_rules(index, lark),
        ]

    def _text_rules(self, index: int, lark: Write) -> list[str]:
        quote = self.language.quote
        if not quote:
            return [f'text_{index}: %json {{"type": "string"}}']
        written = lark(quote)
        if written.startswith("<["):
            inner = f"TEXT_{index}? {written}"
            text = f"TEXT_{index}: /(?s:.+)/ & ~/(?s:.*){regex_of(quote)}(?s:.*)/"
            return [f"text_{index}: {written} {inner}", text]
        return [f"text_{index}: {written} rest_{index}", f"rest_{index}[lazy]: /(?s:.*)/ {written}"]

    # -- reader ------------------------------------------------------------------------------------

    def read(self, cursor: Cursor, tool: Tool) -> Reading[bool]:
        """See Body."""
        source = yield from self._read_source(cursor)
        try:
            values = _Values(source, self.language).arguments()
            cursor.arguments = json.dumps(values, ensure_ascii=False)
        except (ValueError, RecursionError, SyntaxError, MemoryError):
            cursor.arguments = json.dumps({"unparsed": source}, ensure_ascii=False)
        cursor.held = ""
        return (yield from cursor.read_literal(self.end[1:], holds=False))

    def _read_source(self, cursor: Cursor) -> Reading[str]:
        """The text up to the bracket that closes the call."""
        read: list[str] = []
        tail, quote, depth = "", "", 1
        while True:
            char = yield from cursor.next()
            read.append(char)
            tail = (tail + char)[-8:]
            if quote:
                escaped = not self.language.quote and _is_escaped(read)
                quote = quote if escaped or not tail.endswith(quote) else ""
                tail = tail if quote else ""
            elif self.language.quote and tail.endswith(self.language.quote):
                quote, tail = self.language.quote, ""
            elif not self.language.quote and char in _QUOTES:
                quote, tail = char, ""
            else:
                depth += (char in "([{") - (char in ")]}")
                if not depth:
                    return "".join(read[:-1])


def _is_escaped(read: list[str]) -> bool:
    """Whether the last character stands behind an odd number of backslashes."""
    count = 0
    while count < len(read) - 1 and read[-2 - count] == "\\":
        count += 1
    return count % 2 == 1


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


class _Values:
    """Parses the arguments of one call."""

    def __init__(self, source: str, language: Language) -> None:
        if len(source) > _MAX_CHARS:
            raise ValueError("too long")
        self._source, self._at, self._language = source, 0, language

    def arguments(self) -> dict[str, Any]:
        """All arguments by name. Raises ValueError."""
        found = {}
        while self._peek():
            key = self._word(self._language.equals)
            found[key] = self._value(_MAX_DEPTH)
            if self._peek() == ",":
                self._at += 1
            elif self._peek():
                raise ValueError("no comma")
        return found

    def _peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while self._source[self._at : self._at + 1].isspace():
            self._at += 1
        return self._source[self._at : self._at + 1]

    def _word(self, end: str) -> str:
        """The text before `end`, which is skipped."""
        stop = self._source.index(end, self._at)
        word, self._at = self._source[self._at : stop].strip(), stop + len(end)
        return word

    def _value(self, depth: int) -> Any:
        char, quote = self._peek(), self._language.quote
        if not char or not depth:
            raise ValueError("no value")
        if quote and self._source.startswith(quote, self._at):
            return self._text()
        if not quote and char in _QUOTES:
            return self._text()
        if char == "[":
            return [value for _, value in self._items("]", depth)]
        if char == "{":
            return dict(self._items("}", depth))
        start = self._at
        while self._at < len(self._source) and self._source[self._at] not in ",]}":
            self._at += 1
        return self._constant(self._source[start : self._at].strip())

    def _constant(self, word: str) -> Any:
        names = {"true": True, "false": False, "null": None, "none": None}
        return names[word.lower()] if word.lower() in names else plain_json(word)

    def _text(self) -> str:
        if quote := self._language.quote:
            self._at += len(quote)
            stop = self._source.index(quote, self._at)
            text, self._at = self._source[self._at : stop], stop + len(quote)
            return text
        start, quote = self._at, self._source[self._at]
        self._at += 1
        while self._source[self._at] != quote:
            self._at += 2 if self._source[self._at] == "\\" else 1
        self._at += 1
        literal = self._source[start : self._at]
        try:
            return str(json.loads(literal, strict=False))
        except ValueError:
            return str(ast.literal_eval(literal))

    def _items(self, end: str, depth: int) -> list[tuple[str, Any]]:
        """Values up to a closing bracket, of an object with their names."""
        self._at += 1
        found = []
        while self._peek() != end:
            key = ""
            if end == "}":
                is_text = self._peek() in _QUOTES and not self._language.quote
                is_text = is_text or self._is_quoted()
                key = self._text() if is_text else self._word(":")
                if is_text and self._word(":"):
                    raise ValueError("no colon")
            found.append((key, self._value(depth - 1)))
            if self._peek() == ",":
                self._at += 1
        self._at += 1
        return found

    def _is_quoted(self) -> bool:
        quote = self._language.quote
        return bool(quote) and self._source.startswith(quote, self._at)
