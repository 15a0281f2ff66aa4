"""A checked request, with all defaults that need no prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coordinator.text.reasoning import ReasoningFormat
from coordinator.text.tools.format import ToolUse
from coordinator.text.values import Message
from engine.base.seeds import choice_seed
from engine.base.types import Constraint, SamplingParams

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Resume:
    """The part of a choice that the client has already."""

    index: int = 0
    token_ids: Sequence[int] = ()
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
    messages: tuple[Message, ...] | None
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
    tools: ToolUse | None = None  # None: the output is text
    reasoning: ReasoningFormat | None = None  # how the output marks it; None: it is all content
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # of the chat template
    constraint: Constraint | None = None  # on the output
    num_logprobs: int | None = None  # alternatives sent with each token; None: no logprobs
    num_prompt_logprobs: int | None = None  # the same for the prompt's tokens
    echo: bool = False
    index: int = 0  # of the choice
    num_choices: int = 1
    resumes: tuple[Resume, ...] = ()  # of each choice; of none: nothing is resumed

    @property
    def resume(self) -> Resume:
        """What is already delivered of this choice."""
        return self.resumes[self.index] if self.resumes else Resume()

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
        seed = choice_seed(self.sampling.seed, index)
        return replace(self, sampling=replace(self.sampling, seed=seed), index=index)
