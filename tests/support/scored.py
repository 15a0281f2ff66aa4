"""Whole answers of the public API with all log-probabilities of their tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.pb.diptych.v1 import inference_pb2


@dataclass
class Choice:
    """One choice; `scores` has (log-probability, top ids, top log-probabilities) of each token."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    scores: list[Any] = field(default_factory=list)
    finished: inference_pb2.Finished | None = None


@dataclass
class Whole:
    """All that one request brought."""

    choices: dict[int, Choice] = field(default_factory=dict)
    prompt: inference_pb2.Prompt | None = None
    prompt_scores: list[Any] = field(default_factory=list)

    @property
    def only(self) -> Choice:
        (choice,) = self.choices.values()
        return choice

    def take(self, response: inference_pb2.GenerateResponse) -> None:
        if response.HasField("prompt"):
            assert self.prompt is None and not self.choices, "first, and once"
            self.prompt = response.prompt
            self.prompt_scores = [_score(entry) for entry in response.prompt.logprobs]
            return
        choice = self.choices.setdefault(response.index, Choice())
        assert choice.finished is None, "nothing comes after the end"
        if response.HasField("finished"):
            choice.finished = response.finished
        else:
            choice.token_ids += response.delta.token_ids
            choice.text += response.delta.text
            for token_id, entry in zip(
                response.delta.token_ids, response.delta.logprobs, strict=False
            ):
                assert entry.chosen.token_id == token_id
                choice.scores.append(_score(entry))


def _score(entry: inference_pb2.TokenLogprobs) -> tuple[float, tuple[int, ...], tuple[float, ...]]:
    ids = tuple(top.token_id for top in entry.top)
    return entry.chosen.logprob, ids, tuple(top.logprob for top in entry.top)


async def ask(service: Any, timeout_s: float = 120, **fields: Any) -> Whole:
    """One whole answer."""
    whole = Whole()
    async for response in service.Generate(
        inference_pb2.GenerateRequest(**fields), timeout=timeout_s
    ):
        whole.take(response)
    assert all(choice.finished is not None for choice in whole.choices.values())
    return whole
