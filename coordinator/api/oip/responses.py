"""Events of the frontend -> responses of the Open Inference Protocol.

    events --add--> what has gathered, a row a choice --take--> ModelInferResponse

A whole response is taken once, a stream after each event with something new. Owned by one request.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator.api.oip.model import VERSION
from coordinator.api.oip.request import ParsedRequest
from coordinator.api.oip.tensors import BYTES, Tensor, write_tensor
from coordinator.api.ranked import ranked
from coordinator.generation.events import Delta, Event, Finished, PromptEvent
from coordinator.text.values import ScoredToken
from engine.pb.inference import grpc_service_pb2 as pb

FINAL = "triton_final_response"
_PADDING = -1  # after the token ids of a choice that is shorter than another
# These show tokens before their text is released.
_OF_TOKENS = {"output_ids", "num_output_tokens", "cumulative_logprob", "logprobs"}


@dataclass(slots=True)
class _Row:
    """What a choice has added since the last response."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0  # without those of an echoed prompt
    reason: str = ""
    logprobs: list[ScoredToken] = field(default_factory=list)


class ResponseBuilder:
    """The responses to one request."""

    def __init__(self, request: ParsedRequest) -> None:
        num_choices = request.generate.n
        self._request = request
        self._rows = [_Row() for _ in range(num_choices)]
        self._sums = [0.0] * num_choices  # of log-probabilities, over the whole output
        self._num_unfinished = num_choices
        self._num_prompt_tokens: int | None = None
        self._prompt_logprobs: Sequence[ScoredToken] | None = None

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return self._num_unfinished == 0

    def add(self, event: Event) -> None:
        """Take the next event."""
        match event:
            case PromptEvent():
                self._prompt_logprobs = event.logprobs
                for each in self._rows:
                    each.text += event.text
                    each.token_ids += event.token_ids
            case Delta():
                row = self._rows[event.index]
                row.text += event.text
                row.token_ids += event.token_ids
                row.num_tokens += len(event.token_ids)
                row.logprobs += event.logprobs
                self._sums[event.index] += sum(each.chosen.logprob for each in event.logprobs)
            case Finished():
                self._rows[event.index].reason = event.ending.reason.value
                self._num_prompt_tokens = event.usage.prompt_tokens
                self._num_unfinished -= 1

    @property
    def worth_sending(self) -> bool:
        """Whether a response would have something new."""
        tokens = bool(_OF_TOKENS.intersection(self._request.outputs))
        return self._prompt_logprobs is not None or any(
            row.text or row.reason or (tokens and row.token_ids) for row in self._rows
        )

    def take(self, *, final: bool) -> pb.ModelInferResponse:
        """The response with all that was added since the last one."""
        response = bare_response(self._request.generate.model, self._request.id, final=final)
        for name in self._request.outputs:
            if (tensor := self._tensor(name)) is not None:
                write_tensor(response, tensor, raw=self._request.raw)
        self._rows = [_Row() for _ in self._rows]
        self._prompt_logprobs = None
        return response

    def _tensor(self, name: str) -> Tensor | None:
        """An output tensor; None where this response has none."""
        rows = self._rows
        match name:
            case "text_output":  # of one dimension, as TensorRT-LLM's clients decode it
                return Tensor(name, BYTES, (len(rows),), [row.text.encode() for row in rows])
            case "finish_reason":
                return self._make(name, BYTES, [row.reason.encode() for row in rows])
            case "output_ids":
                return self._token_ids()
            case "num_output_tokens":
                return self._make(name, "UINT32", [row.num_tokens for row in rows])
            case "cumulative_logprob":
                return self._make(name, "FP32", list(self._sums))
            case "logprobs":
                return self._make(name, BYTES, [_as_json(row.logprobs) for row in rows])
            case "num_input_tokens" if self._num_prompt_tokens is not None:
                return self._make(name, "UINT32", [self._num_prompt_tokens])
            case "prompt_logprobs" if self._prompt_logprobs is not None:
                # The first token has no log-probability.
                return self._make(name, BYTES, [_as_json(self._prompt_logprobs, (None,))])
        return None

    def _make(self, name: str, datatype: str, values: Sequence[Any], *inner: int) -> Tensor:
        shape = (*inner,) if inner else (len(values),)
        return Tensor(name, datatype, (1, *shape) if self._request.batched else shape, values)

    def _token_ids(self) -> Tensor:
        """One choice: [length]; several: [choices, longest]."""
        rows = [row.token_ids for row in self._rows]
        if len(rows) == 1:
            return self._make("output_ids", "INT32", rows[0])
        longest = max(map(len, rows))
        values = [i for ids in rows for i in (*ids, *[_PADDING] * (longest - len(ids)))]
        return self._make("output_ids", "INT32", values, len(rows), longest)


def bare_response(model_name: str, request_id: str, *, final: bool) -> pb.ModelInferResponse:
    """A response without tensors; `final`: no other follows."""
    response = pb.ModelInferResponse(model_name=model_name, model_version=VERSION, id=request_id)
    response.parameters[FINAL].bool_param = final
    return response


def _as_json(tokens: Sequence[ScoredToken], before: tuple[None, ...] = ()) -> bytes:
    return json.dumps([*before, *map(ranked, tokens)]).encode()
