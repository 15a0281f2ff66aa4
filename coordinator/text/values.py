"""Values of conversations and texts that all packages of the coordinator share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ASSISTANT = "assistant"  # the role of the model's messages


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call in an earlier message of the assistant."""

    id: str = ""
    name: str = ""
    # JSON, or any text; once checked, the object, because templates format it.
    arguments: str | Mapping[str, Any] = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str = ""
    content: str | None = None  # None: an assistant's message without text
    name: str = ""
    tool_calls: Sequence[ToolCall] = ()
    reasoning: str = ""  # of an assistant's message, for templates that show it
    tool_call_id: str = ""  # the call of which this message is the result


@dataclass(frozen=True, slots=True)
class ToolCallPiece:
    """A complete tool call of an output."""

    index: int  # of the call within the output
    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token and its log-probability; `raw`: its bytes, where they are no whole characters."""

    token_id: int
    logprob: float = 0.0
    text: str = ""
    raw: bytes | None = None


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token, the likeliest ones at its place, and the characters of the text before it."""

    chosen: Logprob
    top: Sequence[Logprob] = ()
    text_offset: int = 0
