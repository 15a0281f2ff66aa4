"""What responses of both APIs share: the envelope, usage, and the fold of a stream into one object.

    event --Writer.choices--> choices of a chunk --.-- streamed: chunk after chunk
                                                           '-- else: folded into one object

A choice is numbered prompt * n + choice, as OpenAI numbers them. A writer is for one response.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from coordinator.api.openai.options import Call
from coordinator.generation import events
from coordinator.generation.events import Event, Finished
from engine.base.types import FinishReason

_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORTED: "abort"}
Choice = dict[str, Any]


class Usage:
    """Tokens of one HTTP request: a prompt counts once, whatever the number of its choices."""

    def __init__(self) -> None:
        self.prompt: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._written: dict[int, int] = {}  # by choice

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

    def as_dict(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        prompt, written = sum(self.prompt.values()), sum(self._written.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": written,
            "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


class Writer(ABC):
    """Writes the response of one HTTP request."""

    prefix: str  # of the response's id
    whole_object: str
    chunk_object: str
    is_large = False  # then the whole response is written in a thread

    def __init__(
        self,
        call: Call,
        *,
        model: str,
        created: int,
        prompt_ids: Sequence[Sequence[int]] | None = None,  # where they are shown
    ) -> None:
        self.call = call
        self.shows_ids = bool(call.body.return_token_ids)  # of prompt and output
        self.names_by_id = bool(call.body.return_tokens_as_token_ids)  # tokens in logprobs
        self.usage = Usage()
        self.prompt_ids = prompt_ids
        for index, ids in enumerate(prompt_ids or ()):
            self.usage.prompt[index] = len(ids)
        self._head = {
            "id": f"{self.prefix}-{call.request_id}",
            "created": created,
            "model": model,
        }

    @abstractmethod
    def choices(self, prompt: int, event: Event, first_text: str = "") -> list[Choice]:
        """What an event of the call for `prompt` adds, as choices of a chunk.

        `first_text` is the text of the prompt's first token, where its log-probabilities are shown.
        """

    @abstractmethod
    def fold(self, whole: Choice | None, part: Choice) -> Choice:
        """A choice of a whole response, with what a chunk adds."""

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

    def stop_reason(self, finished: Finished) -> int | str | None:
        """vLLM's: the stop string, or the stop token that the client named."""
        ending = finished.ending
        if ending.matched_text is not None:
            return ending.matched_text
        token = ending.matched_token
        return token if token in (self.call.body.stop_token_ids or ()) else None


def reason_of(finished: Finished) -> str:
    """Why a choice ended, as OpenAI names it."""
    return _REASONS[finished.ending.reason]


def joined(whole: Choice, part: Choice, key: str) -> None:
    """Append a list of the part, where there is one."""
    if part.get(key) is not None:
        whole[key] = [*(whole.get(key) or []), *part[key]]


def replaced(whole: Choice, part: Choice, *keys: str) -> None:
    """Take over the keys that the part has a value for."""
    for key in keys:
        if key in part and (part[key] is not None or key not in whole):
            whole[key] = part[key]
