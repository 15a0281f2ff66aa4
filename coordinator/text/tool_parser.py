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
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from coordinator.text.tool_format import ToolUse
from coordinator.text.values import ToolCallPiece

_NAME = frozenset(string.ascii_letters + string.digits + "_-.")
_MAX_NAME_CHARS = 64  # of a tool
# Each character scans the held text, so its length is bounded; longer text is no call.
_MAX_HELD = 1024
Result = TypeVar("Result")
Reading = Generator[None, str, Result]  # gets characters, until it has a result


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
    """The parser of one output; `num_calls` calls have been released.

    It reads on as a generator, which gets one character after the other.
    """

    def __init__(self, use: ToolUse, make_id: Callable[[int], str]) -> None:
        self.num_calls = 0
        self._format = use.format
        self._names = use.names
        self._make_id = make_id
        self._held = ""  # text that may be part of a call
        self._again = ""  # a character that is read once more
        self._name, self._arguments = "", ""  # of the call that is read
        self._in_text = False
        self._is_call = False  # within or after arguments
        self._is_ending = False  # after arguments
        self._text: list[str] = []
        self._pieces: list[ToolCallPiece] = []
        self._reader = self._read_output()
        next(self._reader)

    def push(self, text: str) -> Parsed:
        """Read the next text of the output."""
        for char in text:
            self._reader.send(char)
        return self._parsed()

    def flush(self, is_cut: bool) -> Parsed:
        """End the output; `is_cut`: a limit cut it off.

        At an end, held text is text, and a call without its end marker is a call. After a cut, held
        text may be the beginning of a call, and is dropped.
        """
        held, self._held = self._held, ""
        if not is_cut and self._is_ending:
            self._release_call()
        elif not is_cut and not self.num_calls:
            self._text.append(held)
        self._is_call = False
        return self._parsed()

    @property
    def is_in_call(self) -> bool:
        """Whether the next text continues a call, or may."""
        if self._is_call or self._in_text:
            return self._is_call
        return bool(self._held) or self.num_calls > 0

    def is_content(self, text: str) -> bool:
        """Whether `text`, if it came next, would neither be part of a call nor begin one."""
        trigger, seen = self._format.trigger, self._held + text
        if self.is_in_call:
            return False
        if not trigger:
            begins = (self._format.begin[:1], self._format.prefix[:1])
            return self._in_text or text.strip()[:1] not in ("", *begins)
        return trigger not in seen and not _overlap(seen, trigger)

    @property
    def held_text(self) -> str:
        """The held text that would be text if the output ended here."""
        return "" if self.num_calls or self._is_call else self._held

    def _parsed(self) -> Parsed:
        parsed = Parsed("".join(self._text), tuple(self._pieces))
        self._text, self._pieces = [], []
        return parsed

    def _next(self) -> Reading[str]:
        """The next character."""
        again, self._again = self._again, ""
        return again or (yield)

    def _read_output(self) -> Reading[None]:
        """Text and calls in turn; without a trigger only the start of an output may be a call."""
        if not self._format.trigger:
            yield from self._read_call("")
        while True:
            yield from self._read_text()
            opening = "[" if self._format.as_list else ""
            while (yield from self._read_call(opening)) and self._format.as_list:
                if not (yield from self._read_separator()):
                    break
                opening = ""

    def _read_text(self) -> Reading[None]:
        """Up to a trigger: releases what cannot begin one; white space after a call is held."""
        trigger, self._in_text = self._format.trigger, True
        while True:
            self._held += yield from self._next()
            if trigger and self._held.endswith(trigger):
                before = self._held.removesuffix(trigger)
                if not self._is_between_calls(before):
                    self._text.append(before)
                self._held, self._in_text = trigger, False
                return
            released = self._held[: len(self._held) - _overlap(self._held, trigger)]
            if len(released) > _MAX_HELD or not self._is_between_calls(released):
                self._text.append(released)
                self._held = self._held[len(released) :]

    def _is_between_calls(self, text: str) -> bool:
        return self.num_calls > 0 and not text.strip()

    def _read_call(self, opening: str) -> Reading[bool]:
        """A call after `opening`, whether another one may follow at once.

        Held text that is no call becomes text. Where only the end marker is missing, the arguments
        are complete, so it is a call.
        """
        form = self._format
        begins = (yield from self._read_literal(opening + form.begin)) and (
            (yield from self._read_name()) and (yield from self._read_literal(form.middle))
        )
        if not begins:
            self._text.append(self._held)
            self._held = ""
            return False
        self._held, self._is_call = "", True
        yield from self._read_arguments()
        self._is_ending = True
        has_end = yield from self._read_literal(form.end, holds=False)
        self._release_call()
        return has_end

    def _read_name(self) -> Reading[bool]:
        """Whether it is the name of a tool."""
        self._name = ""
        while True:
            char = yield from self._next()
            is_of_name = char in _NAME and len(self._name) < _MAX_NAME_CHARS
            is_too_long = len(self._held) > _MAX_HELD
            if is_too_long or not (is_of_name or (char.isspace() and not self._name)):
                self._again = char
                return self._name in self._names and not is_too_long
            self._held += char
            self._name += char.strip()

    def _read_arguments(self) -> Reading[None]:
        """A JSON object, which ends with its last bracket; white space before it is skipped."""
        read: list[str] = []
        depth, in_string, is_escaped = 0, False, False
        while not read or depth > 0 or in_string:
            char = yield from self._next()
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
        self._arguments = "".join(read)

    def _release_call(self) -> None:
        call = self.num_calls
        self._pieces.append(ToolCallPiece(call, self._make_id(call), self._name, self._arguments))
        self.num_calls += 1
        self._is_call = self._is_ending = False

    def _read_separator(self) -> Reading[bool]:
        """Whether another call of the list follows."""
        while (char := (yield from self._next())).isspace():
            pass
        if char != self._format.separator.strip() and char != "]":
            self._again = char
        return char == self._format.separator.strip()

    def _read_literal(self, literal: str, *, holds: bool = True) -> Reading[bool]:
        """Whether `literal` comes next, with any white space between its characters."""
        expected, seen = "".join(literal.split()), 0
        while seen < len(expected):
            char = yield from self._next()
            if char == expected[seen]:
                seen += 1
            elif len(self._held) > _MAX_HELD or not (
                char.isspace() or (not seen and self._reads_prefix(char))
            ):
                self._again = char
                return False
            if holds:
                self._held += char
        return True

    def _reads_prefix(self, char: str) -> bool:
        """Whether the held text is the optional prefix of a call, or a part of it."""
        prefix, held = self._format.prefix, self._held.strip() + char
        return bool(prefix) and not self.num_calls and prefix.startswith(held)


def _overlap(text: str, trigger: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `trigger`."""
    for size in range(min(len(text), len(trigger) - 1), 0, -1):
        if trigger.startswith(text[-size:]):
            return size
    return 0
