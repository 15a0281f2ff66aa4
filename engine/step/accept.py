"""From a step's samples to the progress of its requests: what is kept, counted and reported.

    sampled   s0 s1 s2 s3      draft  d0 d1 d2
    verified  d0 d1 s2         the accepted draft tokens, then the recovered or bonus token
    kept      d0 d1 s2 .       up to the token that ends the answer
    KV        complete before the last kept token

Owned by the engine thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from engine.base.types import FinishReason, TokenLogprobs
from engine.scheduling.load import Totals
from engine.scheduling.request import NO_DRAFT_ID, Request
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.slots import DecodeSlots
from engine.scheduling.speculation import PENDING
from engine.step.constrained import ConstrainedAnswers
from engine.step.lifecycle import Lifecycle
from engine.step.step_sampler import Sampled, SampledRow, StepSampler
from engine.telemetry.metrics import WorkerMetrics


class Acceptor:
    """Advances the rows of a step that was computed."""

    def __init__(
        self,
        scheduler: Scheduler,
        lifecycle: Lifecycle,
        sampler: StepSampler,
        constrained: ConstrainedAnswers,
        metrics: WorkerMetrics,
    ) -> None:
        self.totals = Totals()
        self._scheduler = scheduler
        self._lifecycle = lifecycle
        self._sampler = sampler
        self._constrained = constrained
        self._counters = (
            ("prompt_tokens_computed", metrics.prompt_tokens),
            ("generation_tokens", metrics.generation_tokens),
            ("drafts", metrics.spec_decode_num_drafts),
            ("draft_tokens", metrics.spec_decode_num_draft_tokens),
            ("accepted_tokens", metrics.spec_decode_num_accepted_tokens),
        )
        self._counted = dict.fromkeys((name for name, _ in self._counters), 0)

    def accept(
        self,
        slots: DecodeSlots,
        sampled: Sampled,
        logits: torch.Tensor,
        draft_ends: Mapping[int, int],
    ) -> None:
        """Advance slots and rows by what they computed, and emit what the verifier accepts.

        `draft_ends`: by request key, the position that the draft model's KV reaches.
        """
        tokens, counts = self._verify(slots, sampled)
        self._accept_slots(slots, tokens, counts)
        for row in sampled.rows:
            if row.error is None:
                self._accept(row, logits, draft_ends)
            else:
                self._lifecycle.finish(row.planned.request, FinishReason.ABORTED, row.error)
        for name, counter in self._counters:  # once a step: each counter takes a lock
            value = getattr(self.totals, name)
            if value > self._counted[name]:
                counter.inc(value - self._counted[name])
                self._counted[name] = value

    def _verify(
        self, slots: DecodeSlots, sampled: Sampled
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The slots' tokens [slots, width], and how many of each are part of its answer: the
        accepted ones of its draft, and the one after them. Cuts those of rows to that.
        """
        speculation, num_slots = self._scheduler.speculation, len(slots)
        if speculation is None:  # one of each
            return sampled.tokens[:, None], np.ones(num_slots, np.int64)
        rows = [row for row in sampled.rows if row.tokens]
        requests = [*slots.requests, *(row.planned.request for row in rows)]
        of_rows = np.array([len(row.planned.draft) for row in rows], np.int64)
        lengths = np.concatenate([slots.num_draft, of_rows])
        sampled_tokens = _joined(sampled.tokens, (row.tokens for row in rows))
        tokens, counts = sampled_tokens[:, None], np.ones(len(lengths), np.int64)
        if lengths.any():
            is_token = np.arange(lengths.max() + 1) <= lengths[:, None]
            tokens = np.zeros(is_token.shape, np.int32)
            tokens[is_token] = sampled_tokens
            drafts = np.full_like(tokens[:, 1:], PENDING)
            of_slots = slots.drafts[slots.drafts != PENDING]
            drafts[is_token[:, 1:]] = _joined(of_slots, (row.planned.draft for row in rows))
            counts += speculation.verify(drafts, tokens)
            self._count_drafts(requests, lengths, counts - 1)
        ids = np.array([request.draft_id for request in requests], np.int64)
        drafting = ids != NO_DRAFT_ID  # not where a prompt gave its first token
        speculation.produced(ids[drafting], tokens[drafting], counts[drafting])
        for row, count in zip(rows, counts[num_slots:].tolist(), strict=True):
            row.tokens = row.tokens[:count]
        return tokens[:num_slots], counts[:num_slots]

    def _count_drafts(
        self, requests: Sequence[Request], lengths: NDArray[np.int64], accepted: NDArray[np.int64]
    ) -> None:
        drafted = lengths.nonzero()[0].tolist()
        for i, num_draft, num_accepted in zip(
            drafted, lengths[drafted].tolist(), accepted[drafted].tolist(), strict=True
        ):
            request = requests[i]
            request.num_draft_tokens += num_draft
            request.num_accepted_tokens += num_accepted
            request.counts = None
        self.totals.drafts += len(drafted)
        self.totals.draft_tokens += int(lengths.sum())
        self.totals.accepted_tokens += int(accepted.sum())

    def _accept_slots(
        self, slots: DecodeSlots, tokens: NDArray[np.int32], counts: NDArray[np.int64]
    ) -> None:
        """Append each slot's tokens; there is nothing to mask or score."""
        if not len(slots):
            return
        size = self._scheduler.block_size
        before = (slots.length[: len(slots)] - 1) // size
        kept, ended = slots.append(tokens, counts)
        after = (slots.length[: len(slots)] - 1) // size
        for slot in np.flatnonzero(after > before).tolist():
            self._scheduler.advance(slots.requests[slot], slots.requests[slot].num_computed)
        self.totals.generation_tokens += sum(map(len, kept))
        self._lifecycle.emit_each(slots.requests, kept)
        for request in [slots.requests[slot] for slot in ended]:
            reason = self.ending(request, request.tokens[-1])
            assert reason is not None
            self._lifecycle.finish(request, reason)

    def _accept(self, row: SampledRow, logits: torch.Tensor, draft_ends: Mapping[int, int]) -> None:
        planned = row.planned
        request = planned.request
        num_computed = request.num_computed + planned.num_tokens
        if request.num_computed < request.num_prompt:
            of_prompt = min(num_computed, request.num_prompt) - request.num_computed
            self.totals.prompt_tokens_computed += of_prompt
        # KV exists for the tokens before the newest: the row's own and the accepted draft's. A row
        # without its token has its last position computed again.
        kept: list[int] = []
        reason: FinishReason | None = None
        if row.tokens:
            kept, reason = self._keep(request, row.tokens)
            num_computed += len(kept) - 1
        elif planned.num_sampled:
            num_computed -= 1
        logprobs: Sequence[TokenLogprobs] = ()
        if kept and request.work.num_logprobs is not None:
            logprobs = self._sampler.logprobs(row, kept, logits)
        if planned.num_scored:
            request.num_scored += planned.num_scored
            request.prompt_logprobs += row.prompt_logprobs
        draft_lag = max(0, num_computed - draft_ends[request.key]) if draft_ends else 0
        self._scheduler.advance(request, num_computed, draft_lag)
        self.totals.generation_tokens += len(kept)
        self._lifecycle.emit(request, kept, logprobs)
        if request.work.announce_from >= 0:
            self._lifecycle.announce(request)
        if reason is not None:
            self._lifecycle.finish(request, reason)
        elif not request.wants_tokens and request.num_pending == 0:
            reason = FinishReason.LENGTH if request.is_answer else FinishReason.STOP
            self._lifecycle.finish(request, reason)
        if request.work.matcher is not None:
            self._constrained.end_if_failed(request)

    def _keep(
        self, request: Request, tokens: Sequence[int]
    ) -> tuple[list[int], FinishReason | None]:
        """Append the tokens up to the one that ends the answer."""
        kept: list[int] = []
        matcher = request.work.matcher
        for token in tokens:
            request.tokens.append(token)
            kept.append(token)
            if matcher is not None:
                matcher.advance([token])
            reason = self.ending(request, token)
            if reason is not None:
                return kept, reason
        return kept, None

    def ending(self, request: Request, token: int) -> FinishReason | None:
        """How the token just appended ends the answer, if it does."""
        stop = request.work.stop
        assert stop is not None
        num_tokens = len(request.tokens)
        num_output = num_tokens - request.num_prompt
        if token in stop.stop_token_ids and num_output >= stop.min_tokens:
            request.matched_stop = token
            return FinishReason.STOP
        matcher = request.work.matcher
        if matcher is not None and matcher.ended and not matcher.error:
            return FinishReason.STOP  # nothing can follow, whatever min_tokens and ignore_eos ask
        if num_output >= stop.max_tokens or num_tokens >= self._scheduler.max_model_len:
            return FinishReason.LENGTH
        return None


def _joined(first: NDArray[np.int32], others: Iterable[Sequence[int]]) -> NDArray[np.int32]:
    more = np.array([*chain.from_iterable(others)], np.int32)
    return np.concatenate([first, more])
