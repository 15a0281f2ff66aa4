"""The oracle of disaggregated answers: one process, one token a step, no scheduler, no cache, no
drafts.

Only the model's runner and the sampler are shared with what is tested. Requests of a group are
decoded in lockstep to save time; each has its own blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from engine.base.types import FinishReason
from engine.runner.native_model import NativeModel
from engine.runner.torch_model import TorchModel
from engine.sampling import Sampler, SampleRow
from engine.scheduling.request import EngineRequest
from tests.support.near_tie import TALLY, Verdict, compare
from tests.support.paged import CPU, Bench, Sequence_

_CHUNK = 512


@dataclass(slots=True)
class _Answer:
    work: EngineRequest
    sequence: Sequence_
    token_ids: list[int] = field(default_factory=list)
    reason: FinishReason | None = None


class PlainLoop:
    """The answers to requests, and the verdict on those of another."""

    def __init__(self, model: TorchModel | NativeModel, max_model_len: int = 8192) -> None:
        self._model = model
        self._max_model_len = max_model_len
        self._sampler = Sampler(model.config.vocab_size, CPU)

    def answers(
        self, works: Sequence[EngineRequest], group: int = 8
    ) -> list[tuple[list[int], FinishReason]]:
        """(token ids, reason) of each work, tokens of `work.output` left out."""
        out = []
        for start in range(0, len(works), group):
            out += self._group(works[start : start + group])
        return out

    def judge(self, work: EngineRequest, expected: Sequence[int], got: Sequence[int]) -> Verdict:
        """Law 1 for one answer; a near-tie is counted in the session's tally."""
        return compare(
            expected,
            got,
            lambda i: self._at(work, expected[:i]),
            name=work.request_id,
            tally=TALLY,
        )

    def _bench(self, num_tokens: int) -> Bench:
        return Bench(self._model, block_size=16, num_blocks=num_tokens // 16 + 64)

    def _group(self, works: Sequence[EngineRequest]) -> list[tuple[list[int], FinishReason]]:
        rooms = [len(w.prompt) + self._max_new(w) for w in works]
        bench = self._bench(sum(rooms) + 16 * len(rooms))
        answers = []
        for work in works:
            sequence = bench.sequence(work.prompt + work.output, room=self._max_new(work))
            answers.append(_Answer(work, sequence))
            self._prefill(bench, sequence)
        while running := [a for a in answers if a.reason is None]:
            logits = bench.step(*[(a.sequence, 1, 1) for a in running])
            tokens = self._sampler.sample(logits, [_row(a.work, a.token_ids) for a in running])
            for answer, token in zip(running, tokens, strict=True):
                answer.token_ids.append(token)
                answer.sequence.token_ids.append(token)
                answer.reason = self._ending(answer)
        return [(a.token_ids, a.reason or FinishReason.ABORTED) for a in answers]

    @staticmethod
    def _prefill(bench: Bench, sequence: Sequence_) -> None:
        """All but the last token."""
        while (left := len(sequence.token_ids) - 1 - sequence.num_cached) > 0:
            bench.step((sequence, min(left, _CHUNK), 0))

    def _max_new(self, work: EngineRequest) -> int:
        assert work.stop
        return min(work.stop.max_tokens, self._max_model_len - len(work.prompt))

    def _ending(self, answer: _Answer) -> FinishReason | None:
        stop = answer.work.stop
        assert stop
        num_output = len(answer.work.output) + len(answer.token_ids)
        if answer.token_ids[-1] in stop.stop_token_ids and num_output >= stop.min_tokens:
            return FinishReason.STOP
        if num_output >= stop.max_tokens:
            return FinishReason.LENGTH
        full = len(answer.sequence.token_ids) >= self._max_model_len
        return FinishReason.LENGTH if full else None

    def _at(self, work: EngineRequest, before: Sequence[int]) -> tuple[torch.Tensor, SampleRow]:
        """Logits and row of the token after `before`."""
        tokens = [*work.prompt, *work.output, *before]
        bench = self._bench(len(tokens) + 16)
        sequence = bench.sequence(tokens)
        self._prefill(bench, sequence)
        return bench.step((sequence, 1, 1))[0], _row(work, list(before))


def _row(work: EngineRequest, answer: list[int]) -> SampleRow:
    assert work.sampling
    assert work.stop
    tokens = [*work.prompt, *work.output, *answer]
    early = len(tokens) - len(work.prompt) < work.stop.min_tokens
    banned = work.stop.stop_token_ids if early else frozenset()
    return SampleRow(work.sampling, len(tokens), tokens, len(work.prompt), [], banned)
