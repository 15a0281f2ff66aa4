"""Events -> the responses of /v1/completions."""

from __future__ import annotations

from typing import Any

from coordinator.api.openai.logprobs import ARRAYS, completion_logprobs
from coordinator.api.openai.options import Call
from coordinator.api.openai.responses import Choice, Writer, joined, reason_of, replaced
from coordinator.api.ranked import ranked
from coordinator.generation.events import Delta, Event, Finished, PromptEvent
from coordinator.text.values import Logprob


class CompletionWriter(Writer):
    """See Writer."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, call: Call, **head: Any) -> None:
        super().__init__(call, **head)
        self._num_choices = call.body.n or 1
        self._echo = call.requests[0].output.echo
        self._num_echoed: dict[int, int] = {}  # characters of the prompt, by choice
        self._begun: set[int] = set()

    def choices(self, prompt: int, event: Event, first_text: str = "") -> list[Choice]:
        """See Writer; a prompt that is echoed begins each of its choices."""
        first = prompt * self._num_choices
        match event:
            case PromptEvent():
                return [
                    self._echoed(prompt, i, event, first_text)
                    for i in range(first, first + self._num_choices)
                ]
            case Delta():
                index = first + event.index
                self.usage.wrote(index, len(event.token_ids))
                choice = self._choice(prompt, index, event.text)
                if self.call.logprobs is not None:
                    choice["logprobs"] = completion_logprobs(
                        event.logprobs, self.names_by_id, self._num_echoed.get(index, 0)
                    )
                if self.shows_ids:
                    choice["token_ids"] = list(event.token_ids)
                return [choice]
            case Finished():
                index = first + event.index
                self.usage.finished(prompt, index, event.usage)
                choice = self._choice(prompt, index, "")
                choice["finish_reason"] = reason_of(event)
                choice["stop_reason"] = self.stop_reason(event)
                return [choice]

    def _choice(self, prompt: int, index: int, text: str) -> Choice:
        choice: Choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
        if self.shows_ids and self.prompt_ids is not None and index not in self._begun:
            choice["prompt_token_ids"] = list(self.prompt_ids[prompt])
        self._begun.add(index)
        return choice

    def _echoed(self, prompt: int, index: int, event: PromptEvent, first_text: str) -> Choice:
        choice = self._choice(prompt, index, event.text if self._echo else "")
        if self._echo and self.call.logprobs is not None:
            first = Logprob(event.token_ids[0], text=first_text)
            choice["logprobs"] = completion_logprobs(event.logprobs, self.names_by_id, first=first)
            self._num_echoed[index] = len(event.text)
        if self.call.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = [None, *map(ranked, event.logprobs)]
        return choice

    def fold(self, whole: Choice | None, part: Choice) -> Choice:
        """See Writer."""
        if whole is None:
            return dict(part)
        whole["text"] += part["text"]
        if part["logprobs"] is not None:
            arrays = whole["logprobs"] or {key: [] for key in ARRAYS}
            whole["logprobs"] = {key: arrays[key] + part["logprobs"][key] for key in ARRAYS}
        joined(whole, part, "token_ids")
        replaced(whole, part, "finish_reason", "stop_reason", "prompt_logprobs")
        return whole
