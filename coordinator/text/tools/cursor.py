"""Reads the characters of an output one after the other, for parsers that are generators.

White space between the parts of a call is skipped, so the parser does not depend on how a model
spaces them. Characters that may not belong to a call are kept in `held`, and become text again.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Generator, Sequence
from typing import TypeVar

_NAME = frozenset(string.ascii_letters + string.digits + "_-.")
_MAX_NAME_CHARS = 64  # of a tool
# Each character scans the held text, so its length is bounded; longer text is no call.
MAX_HELD = 1024
# Places in a literal at which a model writes what the server chooses: ids, indexes, types.
_PLACES = re.compile(r"\{(?:id|index|type|name)\}")
_OF_PLACE = _NAME | {":"}
Result = TypeVar("Result")
Reading = Generator[None, str, Result]  # gets characters, until it has a result


def fixed_parts(literal: str) -> list[str]:
    """The texts of a literal between its places."""
    return _PLACES.split(literal)


def places(literal: str) -> list[str]:
    """The names of a literal's places, such as "{id}"."""
    return _PLACES.findall(literal)


def filled(literal: str, values: dict[str, str]) -> str:
    """The literal with a value at each place."""
    return _PLACES.sub(lambda place: values[place[0]], literal)


def regex_of(text: str) -> str:
    """A regular expression of Lark that matches `text`."""
    return re.escape(text).replace("/", "\\/").replace("\\\n", "\\n")


class Cursor:
    """The characters of one output. `arguments` is set while a call is complete but for its end."""

    def __init__(self, prefix: str = "") -> None:
        self.held = ""  # text that may be part of a call
        self.arguments: str | None = None  # JSON, of the call that is read
        self.again = ""  # a character that is read once more
        self.prefix = prefix  # may stand before the first literal, without a meaning

    def next(self) -> Reading[str]:
        """The next character."""
        again, self.again = self.again, ""
        return again or (yield)

    def read_literal(self, literal: str, *, holds: bool = True) -> Reading[bool]:
        """Whether `literal` comes next, with any white space between its characters."""
        for i, part in enumerate(fixed_parts(literal)):
            if i:
                yield from self._read_place()
            if not (yield from self._read_fixed("".join(part.split()), holds=holds)):
                return False
        return True

    def _read_fixed(self, expected: str, *, holds: bool) -> Reading[bool]:
        seen = 0
        while seen < len(expected):
            char = yield from self.next()
            if char == expected[seen]:
                seen += 1
            elif len(self.held) > MAX_HELD or not (
                char.isspace() or (not seen and self._reads_prefix(char))
            ):
                self.again = char
                return False
            if holds:
                self.held += char
        return True

    def _reads_prefix(self, char: str) -> bool:
        """Whether the held text is the optional prefix of a call, or a part of it."""
        return bool(self.prefix) and self.prefix.startswith(self.held.strip() + char)

    def _read_place(self) -> Reading[None]:
        """Skip what stands at a place of a literal."""
        num_chars = 0
        while (char := (yield from self.next())) in _OF_PLACE and num_chars < _MAX_NAME_CHARS:
            self.held += char
            num_chars += 1
        self.again = char

    def read_one_of(self, literals: Sequence[str]) -> Reading[int]:
        """The index of the literal that comes next; -1: none does.

        Of two literals of which one begins with the other, the longer one is preferred.
        """
        expected = ["".join(literal.split()) for literal in literals]
        seen = ""
        while True:
            longer = [e for e in expected if e.startswith(seen) and e != seen]
            if seen in expected and not longer:
                return expected.index(seen)
            char = yield from self.next()
            if any(e.startswith(seen + char) for e in longer):
                seen += char
            elif seen in expected:
                self.again = char
                return expected.index(seen)
            elif not char.isspace() or len(self.held) > MAX_HELD:
                self.again = char
                return -1
            self.held += char

    def read_name(self, names: Collection[str]) -> Reading[str]:
        """The name that comes next; "" if it is none of `names`."""
        name = ""
        while True:
            char = yield from self.next()
            is_of_name = char in _NAME and len(name) < _MAX_NAME_CHARS
            is_too_long = len(self.held) > MAX_HELD
            if is_too_long or not (is_of_name or (char.isspace() and not name)):
                self.again = char
                return name if name in names and not is_too_long else ""
            self.held += char
            name += char.strip()

    def read_until(self, end: str) -> Reading[str]:
        """The text before `end`, which is read too. Not held."""
        read: list[str] = []
        tail = ""
        while not tail.endswith(end):
            char = yield from self.next()
            read.append(char)
            tail = (tail + char)[-len(end) :]
        return "".join(read)[: -len(end)]
