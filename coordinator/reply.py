"""What goes out to a client: parts of an answer as messages of the public API. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from coordinator.request import Chunk, Finished, Part, PromptPart
from coordinator.tokenizer import Tokenizer
from engine.pb.diptych.v1 import inference_pb2
from engine.rpc.convert import reason_to_pb
from engine.types import TokenLogprobs

_BROKEN = "\ufffd"


def reply(request_id: str, part: Part, tokenizer: Tokenizer) -> inference_pb2.GenerateResponse:
    """One message of the stream."""
    if isinstance(part, PromptPart):
        prompt = inference_pb2.Prompt(
            text=part.text,
            token_ids=part.token_ids,
            logprobs=_logprobs(part.token_ids[1:], part.logprobs, tokenizer),
        )
        return inference_pb2.GenerateResponse(request_id=request_id, prompt=prompt)
    if isinstance(part, Chunk):
        delta = inference_pb2.Delta(
            text=part.text,
            token_ids=part.token_ids,
            logprobs=_logprobs(part.token_ids, part.logprobs, tokenizer),
            tool_calls=[inference_pb2.ToolCallDelta(**asdict(piece)) for piece in part.tool_calls],
            home=part.home,
        )
        return inference_pb2.GenerateResponse(request_id=request_id, index=part.index, delta=delta)
    return inference_pb2.GenerateResponse(
        request_id=request_id, index=part.index, finished=_finished(part)
    )


def _logprobs(
    token_ids: Sequence[int], scored: Sequence[TokenLogprobs], tokenizer: Tokenizer
) -> list[inference_pb2.TokenLogprobs]:
    """One entry a token; none where nothing was asked."""

    def entry(token_id: int, logprob: float) -> inference_pb2.Logprob:
        text = tokenizer.text_of(token_id)
        raw = tokenizer.raw_of(token_id) if _BROKEN in text else None
        return inference_pb2.Logprob(token_id=token_id, logprob=logprob, text=text, raw=raw)

    return [
        inference_pb2.TokenLogprobs(
            chosen=entry(token_id, s.chosen),
            top=[entry(*pair) for pair in zip(s.token_ids, s.logprobs, strict=True)],
        )
        for token_id, s in zip(token_ids, scored, strict=False)
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
