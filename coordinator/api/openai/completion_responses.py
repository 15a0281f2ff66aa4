"""Events -> the responses of /v1/completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from coordinator.api.openai.responses import Choice, Writer
from coordinator.api.ranked import finite, ranked
from coordinator.generation.events import Delta, PromptEvent
from coordinator.text.values import Logprob, ScoredToken

_ARRAYS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class CompletionWriter(Writer):
    """See Writer."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._num_echoed: dict[int, int] = {}  # characters of the prompt, by choice
        self._begun: set[int] = set()

    def _whole(self, index: int) -> Choice:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": None}

    def _bare(self, index: int) -> Choice:
        """The first one of a choice has the prompt's tokens."""
        choice = self._whole(index)
        if self.shows_ids and self.prompt_ids is not None and index not in self._begun:
            choice["prompt_token_ids"] = list(self.prompt_ids[index // self.num_choices])
        self._begun.add(index)
        return choice

    def _of_prompt(self, prompt: int, event: PromptEvent, first_text: str) -> list[Choice]:
        """A prompt that is echoed begins each of its choices."""
        output, first = self.call.requests[0].output, prompt * self.num_choices
        choices = [self._bare(index) for index in range(first, first + self.num_choices)]
        for choice in choices:
            if output.echo:
                choice["text"] = event.text
            if output.echo and self.call.logprobs is not None:
                token = Logprob(event.token_ids[0], text=first_text)
                choice["logprobs"] = self._logprobs(event.logprobs, first=token)
                self._num_echoed[choice["index"]] = len(event.text)
            if self.call.body.prompt_logprobs is not None:
                choice["prompt_logprobs"] = [None, *map(ranked, event.logprobs)]
        return choices

    def _of_delta(self, index: int, delta: Delta) -> Choice:
        choice = self._bare(index)
        choice["text"] = delta.text
        if self.call.logprobs is not None:
            num_echoed = self._num_echoed.get(index, 0)
            choice["logprobs"] = self._logprobs(delta.logprobs, num_echoed)
        return choice

    def _logprobs(
        self, entries: Iterable[ScoredToken], num_echoed: int = 0, first: Logprob | None = None
    ) -> dict[str, list[Any]]:
        """Log-probabilities as parallel arrays.

        `num_echoed` characters of the prompt stand before the text of the entries. `first`: the
        first token of a prompt, which has no log-probability and stands before them.
        """
        rows: list[tuple[Any, ...]] = []
        if first is not None:
            rows.append((self.name_of(first), None, None, 0))
        for entry in entries:
            top: dict[str, float] = {}
            for one in (*entry.top, entry.chosen):  # of tokens with one text, the likelier
                top.setdefault(self.name_of(one), finite(one.logprob))
            chosen, offset = entry.chosen, num_echoed + entry.text_offset
            rows.append((self.name_of(chosen), finite(chosen.logprob), top, offset))
        return {name: [row[i] for row in rows] for i, name in enumerate(_ARRAYS)}

    def _add(self, whole: Choice, part: Choice) -> None:
        whole["text"] += part["text"]
        if part["logprobs"] is not None:
            arrays = whole["logprobs"] or {key: [] for key in _ARRAYS}
            whole["logprobs"] = {key: arrays[key] + part["logprobs"][key] for key in _ARRAYS}
