"""A checked request, with all defaults that need no prompt, and the parts of its outputs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from coordinator.text.tool_format import ToolUse
from coordinator.text.values import NOWHERE, ChatMessage, Placement, ToolCallPiece
from engine.base.seeds import choice_seed
from engine.base.types import Constraint, FinishReason, SamplingParams, TokenLogprobs

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Resumed:
    """What the client already has of a choice."""

    token_ids: tuple[int, ...] = ()
    finished: bool = False
    affinity_token: str = ""  # of the decode worker that it came from; "": not known


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A call of Generate or Chat; one of text, token_ids and messages is set.

    It stands for choice 0, and with `num_choices` for all of them; `choice` makes each one's.
    """

    request_id: str
    text: str | None
    token_ids: tuple[int, ...] | None
    messages: tuple[ChatMessage, ...] | None
    sampling: SamplingParams
    max_tokens: int | None  # of the client; None: `default_max_tokens`
    default_max_tokens: int | None  # None: the room left
    min_tokens: int
    stop_strings: tuple[str, ...]
    stop_token_ids: frozenset[int]  # end-of-sequence ids included unless they are ignored
    content_stop_ids: frozenset[int]  # with tools: those that act outside of calls only
    include_stop: bool
    skip_special_tokens: bool
    priority: int
    cache_salt: str
    resumed: tuple[int, ...]  # first tokens of the output, already delivered
    resume_finished: bool
    tools: ToolUse | None = None  # None: the output is text
    constraint: Constraint | None = None  # on the output
    num_logprobs: int | None = None  # alternatives sent with each token; None: no logprobs
    num_prompt_logprobs: int | None = None  # the same for the prompt's tokens
    echo: bool = False
    index: int = 0  # of the choice
    num_choices: int = 1
    resumes: tuple[Resumed, ...] = ()  # of each choice; of none: nothing is resumed

    @property
    def returns_prompt(self) -> bool:
        """Whether choice 0 sends a part of the prompt before its output."""
        is_asked = self.echo or self.num_prompt_logprobs is not None
        is_delivered = any(r.token_ids or r.finished for r in self.resumes)
        return is_asked and not is_delivered and self.index == 0

    @property
    def affinity_token(self) -> str:
        """Of a decode worker that may still have the resumed blocks; "" where none is known."""
        known = [r for r in self.resumes if r.affinity_token and (r.token_ids or r.finished)]
        return min(known, key=lambda r: r.finished).affinity_token if known else ""

    def choice(self, index: int) -> GenerationRequest:
        """The same request for one of its choices: another seed, and its resumed tokens."""
        resumed = self.resumes[index] if self.resumes else Resumed()
        seed = choice_seed(self.sampling.seed, index)
        return replace(
            self,
            sampling=replace(self.sampling, seed=seed),
            index=index,
            resumed=resumed.token_ids,
            resume_finished=resumed.finished,
        )


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of an output, the text that they made final, and their pieces of tool calls."""

    text: str
    token_ids: tuple[int, ...]
    tool_calls: tuple[ToolCallPiece, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one a token, where requested
    index: int = 0  # of the choice
    placement: Placement = NOWHERE  # of its tokens, where there are logprobs
    affinity_token: str = ""  # with a decode worker's first tokens: its `affinity_token_of`


@dataclass(frozen=True, slots=True)
class PromptPart:
    """What the request asks to have of the prompt; comes before all chunks."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]  # of tokens 1, 2, ...
    placement: Placement = NOWHERE  # of all tokens, where there are logprobs


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens of a choice; all choices of a request share the prompt."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    draft_tokens: int
    accepted_tokens: int


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


Part = PromptPart | Chunk | Finished
