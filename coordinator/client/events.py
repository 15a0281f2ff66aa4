"""The events of an output, and the description of errors.

Parts that are the same as on the wire are messages of inference.proto.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from engine.base.errors import DeadlineExceeded, DiptychError
from engine.pb.diptych.v1 import inference_pb2 as pb

# The first event of a request with `echo` or `prompt_logprobs`: text, token_ids, logprobs.
Prompt = pb.Prompt


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Final text of a choice, and its tokens."""

    text: str
    token_ids: tuple[int, ...]
    index: int = 0  # of the choice
    logprobs: tuple[pb.TokenLogprobs, ...] = ()  # one a token, if requested
    tool_calls: tuple[pb.ToolCallDelta, ...] = ()  # the next pieces of calls
    reasoning: str = ""  # comes before the text, and is no part of it


@dataclass(frozen=True, slots=True)
class Done:
    """The end of a choice. `timing`, and the drafts in `usage`, are those of its last call."""

    finish_reason: str  # "stop", "length" or "aborted"
    request_id: str
    usage: pb.Usage  # of this choice; all choices share the prompt
    timing: pb.Timing
    num_resumed: int = 0  # how many further calls continued the output
    index: int = 0  # of the choice
    matched_stop: int | str | None = None  # the stop token or string that ended it


OutputEvent = TextDelta | Done | Prompt


def done(response: pb.GenerateResponse, num_resumed: int) -> Done:
    """The last event of a choice."""
    finished, matched = response.finished, response.finished.matched_stop
    name = pb.FinishReason.Name(finished.finish_reason)
    kind = matched.WhichOneof("kind")
    return Done(
        name.removeprefix("FINISH_REASON_").lower(),
        response.request_id,
        finished.usage,
        finished.timing,
        num_resumed,
        response.index,
        getattr(matched, kind) if kind else None,
    )


def describe(error: BaseException) -> str:
    """One sentence about a failed call, for users."""
    if isinstance(error, DeadlineExceeded):
        return "the call's time ran out"
    if isinstance(error, DiptychError):
        return error.message
    call: Any = error
    return (
        f"{call.code().name}: {call.details()}" if isinstance(error, grpc.RpcError) else str(error)
    )
