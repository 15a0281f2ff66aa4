"""The events of an output, from the generation up to the protocols.

PromptEvent?, then of each choice Delta*, Finished
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.text.values import ScoredToken, ToolCallPiece
from engine.base.types import FinishReason


@dataclass(frozen=True, slots=True)
class PromptEvent:
    """The parts of the prompt that the request wants back; the first event."""

    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[ScoredToken] = ()  # of tokens 1, 2, ...


@dataclass(frozen=True, slots=True)
class Delta:
    """New tokens of a choice, with the text and the tool calls that they complete."""

    index: int = 0  # of the choice
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[ScoredToken] = ()  # one a token, or none
    tool_calls: Sequence[ToolCallPiece] = ()
    reasoning: str = ""  # before the content, of models that think aloud
    affinity_token: str = ""  # with a decode worker's first tokens: its `affinity_token_of`


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens of a choice; all choices of a request share the prompt."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    draft_tokens: int
    accepted_tokens: int
    reasoning_tokens: int = 0  # of the completion


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of a choice went, in seconds; see inference.proto."""

    queue_s: float
    prefill_s: float
    kv_transfer_s: float
    first_token_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Ending:
    """Why an output ended; at most one of the matches is set."""

    reason: FinishReason
    matched_token: int | None = None
    matched_text: str | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last part of a choice."""

    ending: Ending
    usage: Usage
    timing: Timing
    index: int = 0  # of the choice


Event = PromptEvent | Delta | Finished
