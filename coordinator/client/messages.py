"""What a caller says and sees: options -> request, response -> event, error -> a sentence."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from engine.errors import DeadlineExceeded, DiptychError
from engine.pb.diptych.v1 import inference_pb2

_SAMPLING = frozenset(f.name for f in inference_pb2.Sampling.DESCRIPTOR.fields)
_STOP = frozenset(f.name for f in inference_pb2.Stop.DESCRIPTOR.fields)
_PLAIN = frozenset(("request_id", "model", "priority", "cache_salt"))

Request = inference_pb2.GenerateRequest | inference_pb2.ChatRequest


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that became final, and its tokens."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer. `timing`, and the drafts in `usage`, are those of its last call."""

    finish_reason: str  # "stop", "length" or "aborted"
    request_id: str
    usage: inference_pb2.Usage
    timing: inference_pb2.Timing
    num_resumed: int = 0  # how often another call took it up


AnswerEvent = TextDelta | Done


def generate_request(prompt: str | Sequence[int], **options: Any) -> inference_pb2.GenerateRequest:
    """A request for text or token ids; `options`: fields of sampling, stop and request by name."""
    common = _common(options)
    if isinstance(prompt, str):
        return inference_pb2.GenerateRequest(text=prompt, **common)
    ids = inference_pb2.TokenIds(ids=prompt)
    return inference_pb2.GenerateRequest(token_ids=ids, **common)


def chat_request(
    messages: Sequence[Mapping[str, str]], **options: Any
) -> inference_pb2.ChatRequest:
    """A request for the next turn of `messages` of role and content."""
    turns = [inference_pb2.Message(role=m["role"], content=m["content"]) for m in messages]
    return inference_pb2.ChatRequest(messages=turns, **_common(options))


def _common(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword options, None left out, sorted into the messages that they belong to."""
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := given.keys() - _SAMPLING - _STOP - _PLAIN:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}")
    sampling = {key: value for key, value in given.items() if key in _SAMPLING}
    stop = {key: value for key, value in given.items() if key in _STOP}
    return {
        "sampling": inference_pb2.Sampling(**sampling),
        "stop": inference_pb2.Stop(**stop),
        **{key: value for key, value in given.items() if key in _PLAIN},
    }


def give_name(request: Request) -> None:
    """An id if it has none: an unset seed is a hash of it, so that all its calls bring the same."""
    if not request.request_id:
        request.request_id = uuid.uuid4().hex


def resumed(request: Request, token_ids: Sequence[int]) -> Request:
    """The same request whose first tokens are already delivered."""
    again = copy.deepcopy(request)
    del again.resume[:]
    if token_ids:
        again.resume.add(index=0, token_ids=token_ids)
    return again


def done(response: inference_pb2.GenerateResponse, num_resumed: int) -> Done:
    """The last event of an answer."""
    finished = response.finished
    name = inference_pb2.FinishReason.Name(finished.finish_reason)
    reason = name.removeprefix("FINISH_REASON_").lower()
    return Done(reason, response.request_id, finished.usage, finished.timing, num_resumed)


def describe(error: BaseException) -> str:
    """One sentence for a person about a failed call."""
    if isinstance(error, DeadlineExceeded):
        return "the call's time ran out"
    if isinstance(error, DiptychError):
        return error.message
    call: Any = error
    return (
        f"{call.code().name}: {call.details()}" if isinstance(error, grpc.RpcError) else str(error)
    )
