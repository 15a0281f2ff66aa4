"""Readers of reasoning: text of an output -> reasoning and content, the same at any borders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from coordinator.text.reasoning import ReasoningFormat

_MAX_HEADER = 256  # characters of a message's header


@dataclass(frozen=True, slots=True)
class Split:
    """Text that one push released."""

    reasoning: str = ""
    content: str = ""


class ReasoningReader(Protocol):
    """Splits the text of one output."""

    @property
    def is_reasoning(self) -> bool:
        """Whether the next text is reasoning, or may become it."""

    def push(self, text: str) -> Split:
        """Read the next text."""

    def flush(self) -> Split:
        """End the output: held text is released."""


def overlap(text: str, markers: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of one of the markers."""
    longest = max(map(len, markers), default=1) - 1
    for size in range(min(len(text), longest), 0, -1):
        if any(len(m) > size and m.startswith(text[-size:]) for m in markers):
            return size
    return 0


class TagReader:
    """Reasoning between two tags, at the start of an output."""

    def __init__(self, form: ReasoningFormat, is_open: bool | None) -> None:
        self._form = form
        self._begin, self._end = form.begin.strip(), form.end.strip()
        self._state = {True: "reasoning", False: "content", None: "start"}[is_open]
        self._held = ""
        self._skips_space = is_open is not False  # before the next released character

    @property
    def is_reasoning(self) -> bool:
        """See ReasoningReader."""
        return self._state == "reasoning" or (self._state == "start" and bool(self._held.strip()))

    def push(self, text: str) -> Split:
        """See ReasoningReader."""
        self._held += text
        reasoning, content = "", ""
        if self._state == "start":
            self._read_start()
        if self._state == "reasoning":
            reasoning = self._read_reasoning()
        if self._state == "content":
            content = self._read_content()
        return Split(reasoning, content)

    def flush(self) -> Split:
        """See ReasoningReader."""
        held, self._held = self._held, ""
        if self._state == "reasoning":
            return Split(reasoning=held.rstrip())
        return Split(content=held)

    def _read_start(self) -> None:
        begun = self._held.lstrip()
        if begun.startswith(self._begin):
            self._held, self._state = begun[len(self._begin) :], "reasoning"
        elif begun and not self._begin.startswith(begun):
            self._state, self._skips_space = "content", False

    def _read_reasoning(self) -> str:
        if self._skips_space:
            self._held = self._held.lstrip()
            self._skips_space = not self._held
        before, found, after = self._held.partition(self._end)
        if found:
            self._held, self._state, self._skips_space = after, "content", True
            return before.rstrip()
        # White space waits: it is dropped at the end.
        num_held = overlap(before, (self._end,))
        kept = before[: len(before) - num_held].rstrip()
        self._held = before[len(kept) :]
        return kept

    def _read_content(self) -> str:
        text = self._held
        for marker in self._form.dropped:
            text = text.replace(marker, "")
        num_held = overlap(text, self._form.dropped)
        if self._skips_space:
            text = text.lstrip()
            num_held = min(num_held, len(text))
            self._skips_space = not text
        released = text[: len(text) - num_held]
        self._held = text[len(released) :]
        return released


_CALL_HEADER = "<|channel|>commentary to={} <|constrain|>json<|message|>"


class ChannelReader:
    """Messages with headers: <|start|>assistant<|channel|>analysis<|message|>...<|end|>.

    The headers of calls are passed on, all in one form, for the parser of tool calls.
    """

    def __init__(self, form: ReasoningFormat) -> None:
        self._form = form
        self._ends = (form.end, "<|start|>")
        self._state = "header"
        self._is_first = True
        self._kind = "content"
        self._held = ""

    @property
    def is_reasoning(self) -> bool:
        """See ReasoningReader."""
        if self._state == "header":
            return bool(self._held)
        return self._kind == "reasoning"

    def push(self, text: str) -> Split:
        """See ReasoningReader."""
        self._held += text
        parts: dict[str, list[str]] = {"reasoning": [], "content": []}
        while self._read(parts):
            pass
        return Split("".join(parts["reasoning"]), "".join(parts["content"]))

    def flush(self) -> Split:
        """See ReasoningReader."""
        held, self._held = self._held, ""
        if self._state == "header":
            held = ""
        return Split(held, "") if self._kind == "reasoning" else Split("", held)

    def _read(self, parts: dict[str, list[str]]) -> bool:
        """One header or one message; False: more text is needed."""
        if self._state == "header":
            return self._read_header(parts)
        found = [(self._held.find(end), end) for end in self._ends if end in self._held]
        if found:
            at, end = min(found)
            parts[self._kind].append(self._held[:at])
            self._held = self._held[at + len(end) :]
            self._state, self._is_first = "header", False
            return True
        num_held = overlap(self._held, self._ends)
        released = self._held[: len(self._held) - num_held]
        parts[self._kind].append(released)
        self._held = self._held[len(released) :]
        return False

    def _read_header(self, parts: dict[str, list[str]]) -> bool:
        header, found, after = self._held.partition("<|message|>")
        if not found:
            if self._is_first and not self._may_be_header(header):
                self._state, self._kind = "message", "content"
                return True
            self._held = header[-_MAX_HEADER:]
            return False
        self._held, self._state = after, "message"
        self._kind, call = self._kind_of(header)
        parts["content"].append(call)
        return True

    def _may_be_header(self, text: str) -> bool:
        """Whether an output that begins so begins with a header."""
        begins = ("<|channel|>", " to=", "<|start|>assistant", "<|message|>")
        return any(text.startswith(b) or b.startswith(text) for b in begins)

    def _kind_of(self, header: str) -> tuple[str, str]:
        """The part that a message belongs to, and the header of a call as parsers read it."""
        words = header.replace("<|", " <|").replace("|>", "|> ").split()
        recipient = next((word[3:] for word in words if word.startswith("to=")), "")
        if self._form.name == "muse":
            return ("reasoning" if recipient == "self" else "content"), ""
        if recipient.startswith("functions."):
            return "content", _CALL_HEADER.format(recipient)
        return ("reasoning" if "analysis" in words else "content"), ""
