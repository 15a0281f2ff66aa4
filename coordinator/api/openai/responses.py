"""What responses of both APIs share: the envelope, usage, and the fold of a stream into one object.

    event --Writer.choices--> choices of a chunk --.-- streamed: chunk after chunk
                                                   '-- else: folded into one object

A choice is numbered prompt * n + choice, as OpenAI numbers them. A writer is for one response.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from coordinator.api.openai.requests import Call
from coordinator.generation import events
from coordinator.generation.events import Delta, Event, Finished, PromptEvent
from coordinator.text.values import Logprob
from engine.base.types import FinishReason

_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORTED: "abort"}
Choice = dict[str, Any]


class Usage:
    """Tokens of one HTTP request: a prompt counts once, whatever the number of its choices."""

    def __init__(self) -> None:
        self.prompt: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._written: dict[int, int] = {}  # by choice
        self._reasoning: dict[int, int] = {}

    def wrote(self, choice: int, num_tokens: int) -> None:
        """Tokens of a choice came."""
        self._written[choice] = self._written.get(choice, 0) + num_tokens

    def finished(self, prompt: int, choice: int, usage: events.Usage) -> None:
        """The final numbers of a choice."""
        self.prompt[prompt] = usage.prompt_tokens
        # The first of n choices may have computed blocks that the others found cached.
        cached = self._cached.get(prompt, usage.cached_tokens)
        self._cached[prompt] = min(cached, usage.cached_tokens)
        self._written[choice] = usage.completion_tokens
        self._reasoning[choice] = usage.reasoning_tokens

    def as_dict(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        details: dict[str, Any] = {}
        if reasoning := sum(self._reasoning.values()):
            details["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        prompt, written = sum(self.prompt.values()), sum(self._written.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
            **details,
        }


@dataclass(kw_only=True, eq=False)
class Writer(ABC):
    """Writes the response of one HTTP request; a subclass has the shapes of one API."""

    prefix: ClassVar[str]  # of the response's id
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    call: Call
    model: str
    created: int
    prompt_ids: Sequence[Sequence[int]] | None = None  # where they are shown
    usage: Usage = field(default_factory=Usage)
    is_large: bool = False  # then the whole response is written in a thread

    def __post_init__(self) -> None:
        self.num_choices = self.call.body.n or 1  # of each prompt
        self.shows_ids = bool(self.call.body.return_token_ids)  # of prompt and output
        for index, ids in enumerate(self.prompt_ids or ()):
            self.usage.prompt[index] = len(ids)
        response_id = f"{self.prefix}-{self.call.request_id}"
        self._head = {"id": response_id, "created": self.created, "model": self.model}

    @abstractmethod
    def _bare(self, index: int) -> Choice:
        """A choice of a chunk that adds nothing."""

    @abstractmethod
    def _of_prompt(self, prompt: int, event: PromptEvent, first_text: str) -> list[Choice]:
        """What the prompt adds."""

    @abstractmethod
    def _of_delta(self, index: int, delta: Delta) -> Choice:
        """What new tokens of a choice add."""

    @abstractmethod
    def _add(self, whole: Choice, part: Choice) -> None:
        """Add the text and the log-probabilities of a chunk's choice to those of a whole one."""

    @abstractmethod
    def _whole(self, index: int) -> Choice:
        """A choice of a whole response, to which chunks add."""

    def choices(self, prompt: int, event: Event, first_text: str = "") -> list[Choice]:
        """What an event of the call for `prompt` adds, as choices of a chunk.

        `first_text` is the text of the prompt's first token, where its log-probabilities are shown.
        """
        if isinstance(event, PromptEvent):
            return self._of_prompt(prompt, event, first_text)
        index = prompt * self.num_choices + event.index
        if isinstance(event, Delta):
            self.usage.wrote(index, len(event.token_ids))
            choice = self._of_delta(index, event)
            if self.shows_ids:
                choice["token_ids"] = list(event.token_ids)
        else:
            self.usage.finished(prompt, index, event.usage)
            choice = self._bare(index)
            choice["finish_reason"] = self._reason(index, event)
            choice["stop_reason"] = self._stop_reason(event)
        return [choice]

    def fold(self, whole: Choice | None, part: Choice) -> Choice:
        """A choice of a whole response, with what a chunk adds."""
        whole = whole or self._whole(part["index"])
        self._add(whole, part)
        if "token_ids" in part:
            whole["token_ids"] = [*whole.get("token_ids", ()), *part["token_ids"]]
        for key in ("finish_reason", "stop_reason", "prompt_logprobs", "prompt_token_ids"):
            if part.get(key) is not None or key in part.keys() - whole.keys():
                whole[key] = part[key]
        return whole

    def _reason(self, index: int, finished: Finished) -> str:
        """Why a choice ended, as OpenAI names it."""
        return _REASONS[finished.ending.reason]

    def _stop_reason(self, finished: Finished) -> int | str | None:
        """vLLM's: the stop string, or the stop token that the client named."""
        ending = finished.ending
        if ending.matched_text is not None:
            return ending.matched_text
        token = ending.matched_token
        return token if token in (self.call.body.stop_token_ids or ()) else None

    def name_of(self, entry: Logprob) -> str:
        """A token in log-probabilities: its text, or its id where the client asks so."""
        by_id = self.call.body.return_tokens_as_token_ids
        return f"token_id:{entry.token_id}" if by_id else entry.text

    def chunk(self, choices: list[Choice], *, last: bool = False) -> dict[str, Any]:
        """One chunk of a stream; the last one may bring usage in place of choices."""
        out = {**self._head, "object": self.chunk_object, "choices": choices}
        if self.call.include_usage:
            out["usage"] = self.usage.as_dict() if last or self.call.continuous_usage else None
        return out

    def whole(self, choices: dict[int, Choice]) -> dict[str, Any]:
        """The response in one object."""
        return {
            **self._head,
            "object": self.whole_object,
            "choices": [choices[index] for index in sorted(choices)],
            "usage": self.usage.as_dict(),
        }
