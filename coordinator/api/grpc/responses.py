"""Events of the frontend -> messages of the public API. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from coordinator.generation.events import Delta, Event, Finished, PromptEvent
from coordinator.text.values import Logprob, ScoredToken
from engine.pb.diptych.v1 import inference_pb2 as pb
from engine.rpc.convert import enum_to_pb


def alive(request: Any) -> pb.GenerateResponse | None:
    """The message for a silent stream, where the request wants one."""
    if not getattr(request, "alive", False):
        return None
    return pb.GenerateResponse(request_id=request.request_id, alive=pb.Alive())


def response(request_id: str, event: Event) -> pb.GenerateResponse:
    """One message of the stream."""
    if isinstance(event, PromptEvent):
        prompt = pb.Prompt(
            text=event.text, token_ids=event.token_ids, logprobs=_logprobs(event.logprobs)
        )
        return pb.GenerateResponse(request_id=request_id, prompt=prompt)
    if isinstance(event, Delta):
        delta = pb.Delta(
            text=event.text,
            token_ids=event.token_ids,
            logprobs=_logprobs(event.logprobs),
            tool_calls=[pb.ToolCallDelta(**asdict(piece)) for piece in event.tool_calls],
            affinity_token=event.affinity_token,
            reasoning=event.reasoning,
        )
        return pb.GenerateResponse(request_id=request_id, index=event.index, delta=delta)
    return pb.GenerateResponse(request_id=request_id, index=event.index, finished=_finished(event))


def _logprobs(entries: Iterable[ScoredToken]) -> list[pb.TokenLogprobs]:
    return [
        pb.TokenLogprobs(
            chosen=_logprob(entry.chosen),
            top=map(_logprob, entry.top),
            text_offset=entry.text_offset,
        )
        for entry in entries
    ]


def _logprob(entry: Logprob) -> pb.Logprob:
    return pb.Logprob(
        token_id=entry.token_id, logprob=entry.logprob, text=entry.text, raw=entry.raw
    )


def _finished(event: Finished) -> pb.Finished:
    ending, timing = event.ending, event.timing
    matched = None
    if ending.matched_text is not None:
        matched = pb.MatchedStop(text=ending.matched_text)
    elif ending.matched_token is not None:
        matched = pb.MatchedStop(token_id=ending.matched_token)
    return pb.Finished(
        finish_reason=enum_to_pb(ending.reason),
        matched_stop=matched,
        usage=pb.Usage(**asdict(event.usage)),
        timing=pb.Timing(**{name.removesuffix("_s"): s for name, s in asdict(timing).items()}),
    )
