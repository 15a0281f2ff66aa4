"""Events -> the responses of /v1/completions."""

from __future__ import annotations

from typing import Any

from coordinator.api.openai.logprobs import CompletionLogprobs, prompt_logprobs
from coordinator.api.openai.options import Call
from coordinator.api.openai.responses import Choice, Writer, joined, reason_of, replaced
from coordinator.generation.events import Delta, Event, Finished, PromptEvent
from coordinator.text.values import Logprob

_ARRAYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class CompletionWriter(Writer):
    """See Writer."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, call: Call, **head: Any) -> None:
        super().__init__(call, **head)
        self._echo = call.requests[0].output.echo
        self._logprobs: dict[int, CompletionLogprobs] = {}
        self._begun: set[int] = set()

    def choices(self, prompt: int, event: Event, first_text: str = "") -> list[Choice]:
        """See Writer; a prompt that is echoed begins each of its choices."""
        first = prompt * self.format.n
        match event:
            case PromptEvent():
                return [
                    self._echoed(prompt, i, event, first_text)
                    for i in range(first, first + self.format.n)
                ]
            case Delta():
                index = first + event.index
                self.usage.wrote(index, len(event.token_ids))
                choice = self._choice(prompt, index, event.text)
                if self.format.logprobs is not None:
                    logprobs = self._logprobs_of(index)
                    logprobs.add(event.logprobs)
                    choice["logprobs"] = logprobs.take()
                if self.format.token_ids:
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
        if self.format.token_ids and self.prompt_ids is not None and index not in self._begun:
            choice["prompt_token_ids"] = list(self.prompt_ids[prompt])
        self._begun.add(index)
        return choice

    def _logprobs_of(self, index: int) -> CompletionLogprobs:
        if index not in self._logprobs:
            self._logprobs[index] = CompletionLogprobs(self.format.tokens_as_ids)
        return self._logprobs[index]

    def _echoed(self, prompt: int, index: int, event: PromptEvent, first_text: str) -> Choice:
        choice = self._choice(prompt, index, event.text if self._echo else "")
        if self._echo and self.format.logprobs is not None:
            logprobs = self._logprobs_of(index)
            logprobs.add_first(Logprob(event.token_ids[0], text=first_text))
            logprobs.add(event.logprobs)
            choice["logprobs"] = logprobs.take()
            logprobs.num_echoed = len(event.text)
        if self.format.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(event.logprobs)
        return choice

    def fold(self, whole: Choice | None, part: Choice) -> Choice:
        """See Writer."""
        if whole is None:
            return dict(part)
        whole["text"] += part["text"]
        if part["logprobs"] is not None:
            arrays = whole["logprobs"] or {key: [] for key in _ARRAYS}
            whole["logprobs"] = {key: arrays[key] + part["logprobs"][key] for key in _ARRAYS}
        joined(whole, part, "token_ids")
        replaced(whole, part, "finish_reason", "stop_reason", "prompt_logprobs")
        return whole
