"""Parses the text of an output into text and tool calls, character by character.

    text --trigger--> begin --> name --> middle --> arguments --> end --.
     ^                  |         |         |                           |
     |<-- no call: held text is text -------'                           |
     |                                                                  |
     '<--- each call has its trigger, or the list is closed ------------|
                        begin <--- next call of a list -----------------'

What is released depends only on the text so far, so after failover or resume a parser that has read
the same tokens continues where the other stopped. White space between the parts is skipped. A call
is released when it is complete, because a stream cannot withdraw a call that max_tokens cuts off,
and clients run calls that they receive. Owned by one output.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.text.tool_format import ToolUse
from coordinator.text.values import ToolCallPiece

_NAME = frozenset(string.ascii_letters + string.digits + "_-.")
_MAX_NAME_CHARS = 64  # of a tool
# Each character scans the held text, so its length is bounded; longer text is no call.
_MAX_HELD = 1024


def call_id(output_id: str, num_chars: int, call: int) -> str:
    """The id of a call of an output; it does not depend on the worker."""
    digest = hashlib.blake2b(f"{output_id}/{call}".encode(), digest_size=16).hexdigest()
    return digest[:num_chars] if num_chars < 12 else f"call_{digest[:num_chars]}"


@dataclass(frozen=True, slots=True)
class Parsed:
    """The text and calls that one push released."""

    text: str
    pieces: tuple[ToolCallPiece, ...]


class ToolCalls:
    """The parser of one output; `num_calls` calls have been released."""

    def __init__(self, use: ToolUse, make_id: Callable[[int], str]) -> None:
        self.num_calls = 0
        self._format = use.format
        self._names = use.names
        self._make_id = make_id
        self._held = ""  # text that may be part of a call
        self._name = ""
        self._depth, self._in_string, self._escaped = 0, False, False
        self._text: list[str] = []
        self._pieces: list[ToolCallPiece] = []
        self._is_call = False  # within or after arguments
        self._arguments: list[str] = []
        self._expected, self._seen = "", 0
        self._holds = True  # whether the expected literal is held, and is text if it is incomplete
        self._then: Callable[[], None] = self._to_text
        self._broken: Callable[[str], None] = self._no_call
        self._read: Callable[[str], None] = self._read_text  # the state
        if not self._format.trigger:
            self._to_begin()

    def push(self, text: str) -> Parsed:
        """Read the next text of the output."""
        for char in text:
            self._read(char)
        return self._parsed()

    def flush(self, is_cut: bool) -> Parsed:
        """End the output; `is_cut`: a limit cut it off.

        At an end, held text is text, and a call without its end marker is a call. After a cut, held
        text may be the beginning of a call, and is dropped.
        """
        held, self._held = self._held, ""
        if not is_cut and self._read == self._read_expected and self._is_call:
            self._release_call()
        elif not is_cut and not self.num_calls:
            self._text.append(held)
        self._is_call = False
        return self._parsed()

    @property
    def is_in_call(self) -> bool:
        """Whether the next text continues a call, or may."""
        if self._is_call or self._read == self._read_text:
            return self._is_call
        return bool(self._held) or self.num_calls > 0

    def is_content(self, text: str) -> bool:
        """Whether `text`, if it came next, would neither be part of a call nor begin one."""
        trigger, seen = self._format.trigger, self._held + text
        if self.is_in_call:
            return False
        if not trigger:
            begins = (self._format.begin[:1], self._format.prefix[:1])
            return self._read == self._read_text or text.strip()[:1] not in ("", *begins)
        return trigger not in seen and not _overlap(seen, trigger)

    @property
    def held_text(self) -> str:
        """The held text that would be text if the output ended here."""
        return "" if self.num_calls or self._is_call else self._held

    def _parsed(self) -> Parsed:
        parsed = Parsed("".join(self._text), tuple(self._pieces))
        self._text, self._pieces = [], []
        return parsed

    def _is_between_calls(self, text: str) -> bool:
        return self.num_calls > 0 and not text.strip()

    # Text, and how a call begins

    def _to_text(self) -> None:
        self._held, self._read = "", self._read_text

    def _read_text(self, char: str) -> None:
        """Release text that cannot begin a trigger; white space after a call is held."""
        self._held += char
        trigger = self._format.trigger
        if trigger and self._held.endswith(trigger):
            before = self._held.removesuffix(trigger)
            if not self._is_between_calls(before):
                self._text.append(before)
            self._held = trigger
            self._to_begin("[" if self._format.as_list else "")
            return
        released = self._held[: len(self._held) - _overlap(self._held, trigger)]
        if len(released) > _MAX_HELD or not self._is_between_calls(released):
            self._text.append(released)
            self._held = self._held[len(released) :]

    def _to_begin(self, opening: str = "") -> None:
        self._expect(opening + self._format.begin, self._to_name, self._no_call)

    def _to_name(self) -> None:
        self._name, self._read = "", self._read_name

    def _read_name(self, char: str) -> None:
        if len(self._held) > _MAX_HELD:
            self._no_call(char)
        elif (char in _NAME and len(self._name) < _MAX_NAME_CHARS) or (
            char.isspace() and not self._name
        ):
            self._held += char
            self._name += char.strip()
        elif self._name in self._names:
            self._expect(self._format.middle, self._to_arguments, self._no_call)
            self._read(char)
        else:
            self._no_call(char)

    def _no_call(self, char: str) -> None:
        """The held text is no call: release it as text."""
        held = self._held
        self._to_text()
        self._text.append(held)
        self._read(char)

    # Arguments, and how a call ends

    def _to_arguments(self) -> None:
        self._held, self._read = "", self._read_arguments
        self._depth, self._in_string, self._escaped = 0, False, False
        self._arguments, self._is_call = [], True

    def _read_arguments(self, char: str) -> None:
        """Read one character of a JSON object, which ends with its first bracket."""
        if not self._depth and char.isspace():
            return
        self._arguments.append(char)
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        if self._depth <= 0 and not self._in_string:
            self._expect(self._format.end, self._to_next, self._no_end, holds=False)

    def _release_call(self) -> None:
        call, arguments = self.num_calls, "".join(self._arguments)
        self._pieces.append(ToolCallPiece(call, self._make_id(call), self._name, arguments))
        self.num_calls += 1
        self._is_call = False

    def _to_next(self) -> None:
        self._release_call()
        self._to_text()
        if self._format.as_list:
            self._read = self._read_list

    def _read_list(self, char: str) -> None:
        """Read one character between the calls of a list."""
        if char == self._format.separator.strip():
            self._held = ""
            self._to_begin()
        elif char == "]":
            self._to_text()
        elif not char.isspace():
            self._to_text()
            self._read(char)

    def _no_end(self, char: str) -> None:
        """The end marker is missing, but the arguments are complete, so it is a call."""
        self._release_call()
        self._to_text()
        self._read(char)

    # Fixed parts

    def _expect(
        self,
        literal: str,
        then: Callable[[], None],
        broken: Callable[[str], None],
        holds: bool = True,
    ) -> None:
        """Expect `literal` next, with any white space between its characters."""
        self._expected, self._seen, self._holds = "".join(literal.split()), 0, holds
        self._then, self._broken, self._read = then, broken, self._read_expected
        if not self._expected:
            then()

    def _read_expected(self, char: str) -> None:
        if self._seen < len(self._expected) and char == self._expected[self._seen]:
            self._seen += 1
        elif len(self._held) > _MAX_HELD or not (char.isspace() or self._reads_prefix(char)):
            self._broken(char)
            return
        if self._holds:
            self._held += char
        if self._seen == len(self._expected):
            self._then()

    def _reads_prefix(self, char: str) -> bool:
        """Whether the held text is the optional prefix of a call, or a part of it."""
        prefix, held = self._format.prefix, self._held.strip() + char
        return bool(prefix) and not self.num_calls and not self._seen and prefix.startswith(held)


def _overlap(text: str, trigger: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `trigger`."""
    for size in range(min(len(text), len(trigger) - 1), 0, -1):
        if trigger.startswith(text[-size:]):
            return size
    return 0
