"""An answer's text -> plain text and pieces of tool calls, character by character.

    text --trigger--> begin --> name --> middle --> arguments --> end --.
     ^                  |         |         |                           |
     |<-- no call: what was held is text ---'                           |
     |                                                                  |
     '<--- each call has its trigger, or the list is closed ------------|
                        begin <--- another one of a list ---------------'

Fed one token's text at a time; what is released depends on the text so far alone, so a parser that
was fed the same tokens before (failover, resume) goes on where the other one stopped. White space
between the parts is skipped. A call is announced, whole, once it has come to its end: a stream
cannot take back a call that max_tokens then cuts off, and clients run what is announced. Owned by
one answer.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.text.tool_format import ToolUse
from coordinator.text.values import ToolCallPiece

_NAME = frozenset(string.ascii_letters + string.digits + "_-.")
_LONGEST_NAME = 64  # of a tool
# Each character looks at what is held: more is no part of a call.
_MOST_HELD = 1024


def call_id(answer: str, num_chars: int, call: int) -> str:
    """The id of a call of `answer` (a name): the same whoever writes the answer's next token."""
    digest = hashlib.blake2b(f"{answer}/{call}".encode(), digest_size=16).hexdigest()
    return digest[:num_chars] if num_chars < 12 else f"call_{digest[:num_chars]}"


@dataclass(frozen=True, slots=True)
class Parsed:
    """What one push released."""

    text: str
    pieces: tuple[ToolCallPiece, ...]


class ToolCalls:
    """The calls of one answer; `num_calls` have been announced."""

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
        self._is_call = False  # arguments have begun
        self._arguments: list[str] = []
        self._expected, self._seen = "", 0
        self._holds = True  # whether what is expected is text if it does not come
        self._then: Callable[[], None] = self._to_text
        self._broken: Callable[[str], None] = self._no_call
        self._read: Callable[[str], None] = self._read_text  # the state
        if not self._format.trigger:
            self._to_begin()

    def push(self, text: str) -> Parsed:
        """Take the next text of the answer."""
        for char in text:
            self._read(char)
        return self._parsed()

    def flush(self, is_cut: bool) -> Parsed:
        """The answer has ended, or `is_cut`: it would have gone on.

        At its end what is held is text, and a call without its last marker is a call. Where it is
        cut, what is held may be the beginning of a call, and is nothing.
        """
        held, self._held = self._held, ""
        if not is_cut and self._read == self._read_expected and self._is_call:
            self._announce()
        elif not is_cut and not self.num_calls:
            self._text.append(held)
        self._is_call = False
        return self._parsed()

    @property
    def is_in_call(self) -> bool:
        """Whether what comes next would be part of a call, as far as it goes."""
        if self._is_call or self._read == self._read_text:
            return self._is_call
        return bool(self._held) or self.num_calls > 0

    def is_content(self, text: str) -> bool:
        """Whether `text`, if it came next, would be part of no call, and begin none."""
        trigger, seen = self._format.trigger, self._held + text
        if self.is_in_call:
            return False
        if not trigger:
            begins = (self._format.begin[:1], self._format.lead[:1])
            return self._read == self._read_text or text.strip()[:1] not in ("", *begins)
        return trigger not in seen and not _overlap(seen, trigger)

    @property
    def held_text(self) -> str:
        """What would be text if the answer ended here."""
        return "" if self.num_calls or self._is_call else self._held

    def _parsed(self) -> Parsed:
        parsed = Parsed("".join(self._text), tuple(self._pieces))
        self._text, self._pieces = [], []
        return parsed

    def _says_nothing(self, text: str) -> bool:
        return self.num_calls > 0 and not text.strip()

    # Text, and how a call begins

    def _to_text(self) -> None:
        self._held, self._read = "", self._read_text

    def _read_text(self, char: str) -> None:
        """Release what cannot begin a trigger; white space after a call waits for what follows."""
        self._held += char
        trigger = self._format.trigger
        if trigger and self._held.endswith(trigger):
            before = self._held.removesuffix(trigger)
            if not self._says_nothing(before):
                self._text.append(before)
            self._held = trigger
            self._to_begin("[" if self._format.as_list else "")
            return
        released = self._held[: len(self._held) - _overlap(self._held, trigger)]
        if len(released) > _MOST_HELD or not self._says_nothing(released):
            self._text.append(released)
            self._held = self._held[len(released) :]

    def _to_begin(self, opening: str = "") -> None:
        self._expect(opening + self._format.begin, self._to_name, self._no_call)

    def _to_name(self) -> None:
        self._name, self._read = "", self._read_name

    def _read_name(self, char: str) -> None:
        if len(self._held) > _MOST_HELD:
            self._no_call(char)
        elif (char in _NAME and len(self._name) < _LONGEST_NAME) or (
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
        """What looked like a call was none."""
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
        """One character of a JSON object, which ends where its first bracket is closed."""
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

    def _announce(self) -> None:
        call, arguments = self.num_calls, "".join(self._arguments)
        self._pieces.append(ToolCallPiece(call, self._make_id(call), self._name, arguments))
        self.num_calls += 1
        self._is_call = False

    def _to_next(self) -> None:
        self._announce()
        self._to_text()
        if self._format.as_list:
            self._read = self._read_list

    def _read_list(self, char: str) -> None:
        """Between the calls of a list."""
        if char == self._format.separator.strip():
            self._held = ""
            self._to_begin()
        elif char == "]":
            self._to_text()
        elif not char.isspace():
            self._to_text()
            self._read(char)

    def _no_end(self, char: str) -> None:
        """Another thing than the call's end: its arguments are whole, so it is one."""
        self._announce()
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
        """Next comes `literal`, with any white space between its characters."""
        self._expected, self._seen, self._holds = "".join(literal.split()), 0, holds
        self._then, self._broken, self._read = then, broken, self._read_expected
        if not self._expected:
            then()

    def _read_expected(self, char: str) -> None:
        if self._seen < len(self._expected) and char == self._expected[self._seen]:
            self._seen += 1
        elif len(self._held) > _MOST_HELD or not (char.isspace() or self._reads_lead(char)):
            self._broken(char)
            return
        if self._holds:
            self._held += char
        if self._seen == len(self._expected):
            self._then()

    def _reads_lead(self, char: str) -> bool:
        """Whether this is the word that may stand before a call, or a beginning of it."""
        lead, held = self._format.lead, self._held.strip() + char
        return bool(lead) and not self.num_calls and not self._seen and lead.startswith(held)


def _overlap(text: str, trigger: str) -> int:
    """Length of the longest end of `text` that begins `trigger`, which it does not end with."""
    for size in range(min(len(text), len(trigger) - 1), 0, -1):
        if trigger.startswith(text[-size:]):
            return size
    return 0
