"""A request after the door: checked, and with the defaults that need no prompt applied."""

from __future__ import annotations

from dataclasses import dataclass

from engine.types import FinishReason, SamplingParams

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """What a call of Generate or Chat asks for; one of text, token_ids and messages is set."""

    request_id: str
    text: str | None
    token_ids: tuple[int, ...] | None
    messages: tuple[ChatMessage, ...] | None
    sampling: SamplingParams
    max_tokens: int | None  # as the client said; None: `default_max_tokens`
    default_max_tokens: int | None  # None: the room left
    min_tokens: int
    stop_strings: tuple[str, ...]
    stop_token_ids: frozenset[int]  # end-of-sequence ids included unless they are ignored
    include_stop: bool
    skip_special_tokens: bool
    priority: int
    cache_salt: str
    resumed: tuple[int, ...]  # first tokens of the answer, already delivered
    resume_finished: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of an answer and the text that they made final."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer took, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    draft_tokens: int
    accepted_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the time of an answer went, in seconds; see inference.proto."""

    queue_s: float
    prefill_s: float
    kv_transfer_s: float
    first_token_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Ending:
    """Why an answer ended; at most one of the matches is set."""

    reason: FinishReason
    matched_token: int | None = None
    matched_text: str | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The last word of an answer."""

    ending: Ending
    usage: Usage
    timing: Timing
