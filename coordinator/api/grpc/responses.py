"""What goes out to a client: parts of an answer as messages of the public API. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from coordinator.generation.request import Chunk, Finished, Part, PromptPart
from coordinator.text.detokenizer import BROKEN
from coordinator.text.tokenizer import Tokenizer
from coordinator.text.values import Placement
from engine.base.types import TokenLogprobs
from engine.pb.diptych.v1 import inference_pb2
from engine.rpc.convert import reason_to_pb


def alive(request: Any) -> inference_pb2.GenerateResponse | None:
    """What the stream brings while nothing else does, where the request asks for it."""
    if not getattr(request, "alive", False):
        return None
    return inference_pb2.GenerateResponse(
        request_id=request.request_id, alive=inference_pb2.Alive()
    )


def response(request_id: str, part: Part, tokenizer: Tokenizer) -> inference_pb2.GenerateResponse:
    """One message of the stream."""
    if isinstance(part, PromptPart):
        prompt = inference_pb2.Prompt(
            text=part.text,
            token_ids=part.token_ids,
            logprobs=_logprobs(part.token_ids, part.logprobs, part.placement, tokenizer, first=1),
        )
        return inference_pb2.GenerateResponse(request_id=request_id, prompt=prompt)
    if isinstance(part, Chunk):
        delta = inference_pb2.Delta(
            text=part.text,
            token_ids=part.token_ids,
            logprobs=_logprobs(part.token_ids, part.logprobs, part.placement, tokenizer),
            tool_calls=[inference_pb2.ToolCallDelta(**asdict(piece)) for piece in part.tool_calls],
            affinity_token=part.affinity_token,
        )
        return inference_pb2.GenerateResponse(request_id=request_id, index=part.index, delta=delta)
    return inference_pb2.GenerateResponse(
        request_id=request_id, index=part.index, finished=_finished(part)
    )


def _logprobs(
    token_ids: Sequence[int],
    scored: Sequence[TokenLogprobs],
    placement: Placement,
    tokenizer: Tokenizer,
    first: int = 0,  # the token that the first entry is of
) -> list[inference_pb2.TokenLogprobs]:
    """One entry a token; none where nothing was asked."""

    def entry(index: int, token_id: int, logprob: float) -> inference_pb2.Logprob:
        at_start = index < placement.num_at_start
        text = tokenizer.text_at_start(token_id) if at_start else tokenizer.text_of(token_id)
        raw = tokenizer.raw_of(token_id) if BROKEN in text else None
        return inference_pb2.Logprob(token_id=token_id, logprob=logprob, text=text, raw=raw)

    return [
        inference_pb2.TokenLogprobs(
            chosen=entry(i, token_ids[i], s.chosen),
            top=[entry(i, *pair) for pair in zip(s.token_ids, s.logprobs, strict=True)],
            text_offset=placement.offsets[i],
        )
        for i, s in enumerate(scored, start=first)
    ]


def _finished(part: Finished) -> inference_pb2.Finished:
    ending, timing = part.ending, part.timing
    matched = None
    if ending.matched_text is not None:
        matched = inference_pb2.MatchedStop(text=ending.matched_text)
    elif ending.matched_token is not None:
        matched = inference_pb2.MatchedStop(token_id=ending.matched_token)
    return inference_pb2.Finished(
        finish_reason=reason_to_pb(ending.reason),
        matched_stop=matched,
        usage=inference_pb2.Usage(**asdict(part.usage)),
        timing=inference_pb2.Timing(
            queue=timing.queue_s,
            prefill=timing.prefill_s,
            kv_transfer=timing.kv_transfer_s,
            first_token=timing.first_token_s,
            decode=timing.decode_s,
        ),
    )
