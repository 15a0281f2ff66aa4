"""Parses the text of an output into text and tool calls, character by character.

    text --trigger--> begin --> name --> middle --> arguments --> end --.
     ^                  |         |         |                           |
     |<-- no call: held text is text -------'                           |
     |                                                                  |
     '<--- each call has its trigger, or the calls are closed ----------|
                        begin <--- next call of several ----------------'

What is released depends only on the text so far, so after failover or resume a parser that has read
the same tokens continues where the other stopped. White space between the parts is skipped. A call
is released when it is complete, because a stream cannot withdraw a call that max_tokens cuts off,
and clients run calls that they receive. Owned by one output.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.text.tools.cursor import MAX_HELD, Cursor, Reading, fixed_parts
from coordinator.text.tools.format import ToolFormat, ToolUse
from coordinator.text.values import ToolCallPiece

MakeId = Callable[[int, str], str]  # of a call's index and name


def call_id(output_id: str, form: ToolFormat, call: int, name: str) -> str:
    """The id of a call of an output; it does not depend on the worker."""
    if form.numbered_ids:
        return f"functions.{name}:{call}"
    digest = hashlib.blake2b(f"{output_id}/{call}".encode(), digest_size=16).hexdigest()
    num_chars = form.id_chars
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

    def __init__(self, use: ToolUse, make_id: MakeId) -> None:
        self.num_calls = 0
        self._format = use.format
        self._tools = use.by_name
        self._make_id = make_id
        self._cursor = Cursor(use.format.prefix)
        self._name = ""  # of the call that is read
        self._in_text = False
        self._is_call = False  # within or after arguments
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
        held, self._cursor.held = self._cursor.held, ""
        if not is_cut and self._is_call and self._cursor.arguments is not None:
            self._release_call()
        elif not is_cut and not self.num_calls and not self._is_call:
            self._text.append(held)
        self._is_call = False
        return self._parsed()

    @property
    def is_in_call(self) -> bool:
        """Whether the next text continues a call, or may."""
        if self._is_call or self._in_text:
            return self._is_call
        return bool(self._cursor.held) or self.num_calls > 0

    def is_content(self, text: str) -> bool:
        """Whether `text`, if it came next, would neither be part of a call nor begin one."""
        trigger, seen = self._format.trigger, self._cursor.held + text
        if self.is_in_call:
            return False
        if not trigger:
            begins = (self._format.body.begin[:1], self._format.prefix[:1])
            return self._in_text or text.strip()[:1] not in ("", *begins)
        return trigger not in seen and not _overlap(seen, trigger)

    @property
    def held_text(self) -> str:
        """The held text that would be text if the output ended here."""
        return "" if self.num_calls or self._is_call else self._cursor.held

    def _parsed(self) -> Parsed:
        parsed = Parsed("".join(self._text), tuple(self._pieces))
        self._text, self._pieces = [], []
        return parsed

    def _read_output(self) -> Reading[None]:
        """Text and calls in turn; without a trigger only the start of an output may be a call."""
        form = self._format
        if not form.trigger:
            yield from self._read_call(form.opening + form.body.begin)
        while True:
            yield from self._read_text()
            begin: str | None = form.opening + form.body.begin
            while begin is not None:
                has_end = yield from self._read_call(begin)
                begin = (yield from self._read_separator()) if has_end and form.once else None

    def _read_text(self) -> Reading[None]:
        """Up to a trigger: releases what cannot begin one; white space after a call is held."""
        cursor, trigger, self._in_text = self._cursor, self._format.trigger, True
        while True:
            cursor.held += yield from cursor.next()
            if trigger and cursor.held.endswith(trigger):
                before = cursor.held.removesuffix(trigger)
                if not self._is_between_calls(before):
                    self._text.append(before)
                cursor.held, self._in_text = trigger, False
                return
            released = cursor.held[: len(cursor.held) - _overlap(cursor.held, trigger)]
            if len(released) > MAX_HELD or not self._is_between_calls(released):
                self._text.append(released)
                cursor.held = cursor.held[len(released) :]

    def _is_between_calls(self, text: str) -> bool:
        return self.num_calls > 0 and not text.strip()

    def _read_call(self, begin: str) -> Reading[bool]:
        """A call that `begin` begins, whether another one may follow at once.

        Held text that is no call becomes text. Where only the end marker is missing, the arguments
        are complete, so it is a call.
        """
        cursor = self._cursor
        begins = yield from cursor.read_literal(begin)
        if begins:
            self._name = yield from cursor.read_name(self._tools)
            begins = bool(self._name) and (yield from cursor.read_literal(self._format.body.middle))
        if not begins:
            self._text.append(cursor.held)
            cursor.held = ""
            return False
        cursor.held, cursor.prefix, cursor.arguments, self._is_call = "", "", None, True
        has_end = yield from self._format.body.read(cursor, self._tools[self._name])
        self._release_call()
        return has_end

    def _release_call(self) -> None:
        call, arguments = self.num_calls, self._cursor.arguments
        assert arguments is not None, "a call is released with its arguments"
        call_id = self._make_id(call, self._name)
        self._pieces.append(ToolCallPiece(call, call_id, self._name, arguments))
        self.num_calls += 1
        self._is_call, self._cursor.held = False, ""

    def _read_separator(self) -> Reading[str | None]:
        """The rest of what begins the next call; None: no other call follows."""
        begin, closing = self._format.separator + self._format.body.begin, self._format.closing
        first = fixed_parts(begin)[0]
        found = yield from self._cursor.read_one_of((first, closing))
        if found == 1:
            self._cursor.held = ""
        return begin[len(first) :] if found == 0 else None


def _overlap(text: str, trigger: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `trigger`."""
    for size in range(min(len(text), len(trigger) - 1), 0, -1):
        if trigger.startswith(text[-size:]):
            return size
    return 0
