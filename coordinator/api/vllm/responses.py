"""Events of the frontend -> responses of the protocol between gateways and vLLM.

A stream has a chunk for new tokens and a `complete` for each choice; without `stream` there are
only the latter. Owned by one request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from coordinator.generation.events import Delta, Ending, Event, Finished, PromptEvent, Usage
from coordinator.text.values import ScoredToken
from engine.base.types import FinishReason
from engine.pb.vllm import vllm_engine_pb2 as pb

_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length", FinishReason.ABORTED: "abort"}


@dataclass(slots=True)
class _Choice:
    """The tokens of a choice so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[ScoredToken] = field(default_factory=list)
    finished: bool = False


class ResponseBuilder:
    """The responses to one request."""

    def __init__(self, request: pb.GenerateRequest) -> None:
        self._stream = request.stream
        self._top = request.sampling_params.logprobs > 0
        self._num_choices = request.sampling_params.n or 1
        self._num_prompt_tokens = len(request.tokenized.input_ids)  # 0: not known yet
        self._choices: dict[int, _Choice] = {}
        self._input: pb.InputLogProbs | None = None

    def add(self, event: Event) -> Iterator[pb.GenerateResponse]:
        """The responses to an event."""
        match event:
            case PromptEvent():
                self._input = _input_logprobs(event)
            case Delta():
                first = event.index not in self._choices
                choice = self._choices.setdefault(event.index, _Choice())
                choice.token_ids += event.token_ids
                choice.logprobs += event.logprobs
                if self._stream and event.token_ids:
                    yield self._chunk(event, first)
            case Finished(ending, usage, _, index):
                yield self._complete(index, ending, usage)

    def abort(self) -> Iterator[pb.GenerateResponse]:
        """The ends of the choices that are unfinished."""
        ending, usage = Ending(FinishReason.ABORTED), Usage(self._num_prompt_tokens, 0, 0, 0, 0)
        for index in range(self._num_choices):
            choice = self._choices.get(index)
            if choice is None or not choice.finished:
                yield self._complete(index, ending, usage)

    def _chunk(self, event: Delta, first: bool) -> pb.GenerateResponse:
        chunk = pb.GenerateStreamChunk(
            token_ids=event.token_ids,
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=len(event.token_ids),
            output_logprobs=_output_logprobs(event.logprobs, self._top),
            input_logprobs=self._input if first else None,
            index=event.index,
        )
        return pb.GenerateResponse(chunk=chunk)

    def _complete(self, index: int, ending: Ending, usage: Usage) -> pb.GenerateResponse:
        choice = self._choices.setdefault(index, _Choice())
        choice.finished = True
        complete = pb.GenerateComplete(
            output_ids=choice.token_ids,
            finish_reason=_REASONS[ending.reason],
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=len(choice.token_ids),
            cached_tokens=usage.cached_tokens,
            output_logprobs=_output_logprobs(choice.logprobs, self._top),
            input_logprobs=self._input,
            index=index,
            spec_accepted_tokens=usage.accepted_tokens,
            spec_draft_tokens=usage.draft_tokens,
        )
        if ending.matched_text is not None:
            complete.matched_stop_str = ending.matched_text
        elif ending.matched_token is not None:
            complete.matched_token_id = ending.matched_token
        return pb.GenerateResponse(complete=complete)


def _output_logprobs(tokens: Sequence[ScoredToken], top: bool) -> pb.OutputLogProbs | None:
    if not tokens:
        return None
    return pb.OutputLogProbs(
        token_logprobs=[token.chosen.logprob for token in tokens],
        token_ids=[token.chosen.token_id for token in tokens],
        top_logprobs=[_top_logprobs(token) for token in tokens] if top else [],
    )


def _input_logprobs(prompt: PromptEvent) -> pb.InputLogProbs | None:
    """The first token has no log-probability: its entry is empty."""
    if not prompt.logprobs:
        return None
    value = pb.InputTokenLogProb
    top = any(token.top for token in prompt.logprobs)
    none = [pb.TopLogProbs()] if top else []
    return pb.InputLogProbs(
        token_ids=prompt.token_ids,
        token_logprobs=[value(), *(value(value=t.chosen.logprob) for t in prompt.logprobs)],
        top_logprobs=[*none, *(_top_logprobs(token) for token in prompt.logprobs if top)],
    )


def _top_logprobs(token: ScoredToken) -> pb.TopLogProbs:
    return pb.TopLogProbs(
        values=[each.logprob for each in token.top], token_ids=[each.token_id for each in token.top]
    )
