"""The plain loop of an answer under a grammar: one token at a time, no batch, no drafts."""

from __future__ import annotations

from engine.base.types import FinishReason
from engine.sampling import Sampler, SampleRow
from engine.scheduling.request import EngineRequest
from tests.support.history_model import VOCAB, logits_of
from tests.support.tiny_grammar import (
    mask_after,
    matcher_of,
    schema,
)

PERSON = schema(
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


def plain_loop(work: EngineRequest, grammar: str) -> tuple[list[int], FinishReason]:
    """One token at a time; the grammar is asked anew about all tokens each time."""
    assert work.sampling
    assert work.stop
    sampler = Sampler(VOCAB)
    answer, new = list(work.output), []
    while True:
        banned = work.stop.stop_token_ids if len(answer) < work.stop.min_tokens else frozenset()
        tokens = [*work.prompt, *answer]
        mask = mask_after(grammar, answer)
        row = SampleRow(work.sampling, len(tokens), tokens, len(work.prompt), (), banned, mask)
        token = sampler.sample(logits_of(tokens)[None], [row])[0]
        answer.append(token)
        new.append(token)
        if token in work.stop.stop_token_ids and len(answer) >= work.stop.min_tokens:
            return new, FinishReason.STOP
        if matcher_of(grammar, answer).ended:
            return new, FinishReason.STOP
        if len(answer) >= work.stop.max_tokens:
            return new, FinishReason.LENGTH
