"""Values of conversations and of text, which every room of the coordinator passes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ASSISTANT = "assistant"  # the role of the model's own turns


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an earlier turn made."""

    id: str
    name: str
    arguments: Mapping[str, Any]  # parsed: templates write them as they like


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str | None  # None: an assistant's turn without text
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""  # the call that this turn answers


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """A tool call that has come to its end."""

    index: int  # of the call within the answer
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Placement:
    """Where tokens stand in a text."""

    offsets: tuple[int, ...] = ()  # of each: the characters before its own
    num_at_start: int = 0  # first tokens, before which there is nothing in the whole text


NOWHERE = Placement()
