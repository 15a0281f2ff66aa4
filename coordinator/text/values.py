"""Values of conversations and texts that all packages of the coordinator share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ASSISTANT = "assistant"  # the role of the model's messages


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call in an earlier message of the assistant."""

    id: str
    name: str
    arguments: Mapping[str, Any]  # parsed, because templates format them


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    role: str
    content: str | None  # None: an assistant's message without text
    name: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""  # the call of which this message is the result


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """A complete tool call of an output."""

    index: int  # of the call within the output
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Placement:
    """The positions of tokens in a text."""

    offsets: tuple[int, ...] = ()  # of each token, in characters
    num_at_start: int = 0  # tokens before which the whole text is empty


NOWHERE = Placement()
