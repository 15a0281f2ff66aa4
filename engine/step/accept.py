"""From a step's samples to the progress of its requests: what is kept, counted and reported.

    sampled   s0 s1 s2 s3      draft  d0 d1 d2
    verified  d0 d1 s2         the accepted draft tokens, then the recovered or bonus token
    kept      d0 d1 s2 .       up to the token that ends the answer
    KV        complete before the last kept token

Owned by the engine thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.base.types import FinishReason, TokenLogprobs
from engine.scheduling.request import Request
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.slots import DecodeSlots
from engine.step.constrained import ConstrainedAnswers
from engine.step.lifecycle import Lifecycle
from engine.step.step_sampler import Sampled, SampledRow, StepSampler
from engine.telemetry.metrics import WorkerMetrics


@dataclass(slots=True)
class Totals:
    """Counted since the start."""

    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    generation_tokens: int = 0
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


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
        if sampled.tokens:
            self._accept_slots(slots, sampled.tokens)
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

    def _accept_slots(self, slots: DecodeSlots, tokens: Sequence[int]) -> None:
        """Append each slot's token; there is nothing to verify, mask or score."""
        num_computed = slots.length[: len(tokens)]
        full = np.flatnonzero(num_computed % self._scheduler.block_size == 0)
        filled = [slots.requests[i] for i in full]
        ended = slots.append(tokens)
        for request in filled:
            self._scheduler.advance(request, request.num_computed)
        self.totals.generation_tokens += len(tokens)
        self._lifecycle.emit_each(slots.requests, tokens)
        if (speculation := self._scheduler.speculation) is not None:
            for request, token in zip(slots.requests, tokens, strict=True):
                speculation.produced(str(request.key), (token,))
        for request in ended:
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
            kept, reason = self._keep(request, self._verify(row))
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

    def _verify(self, row: SampledRow) -> Sequence[int]:
        """The accepted tokens of the row's draft, and the one after them."""
        speculation, request, draft = (
            self._scheduler.speculation,
            row.planned.request,
            row.planned.draft,
        )
        sampled: Sequence[int] = row.tokens
        if speculation is None:
            return sampled
        if draft:
            verified = speculation.verify(draft, sampled)
            sampled = verified.tokens
            request.num_draft_tokens += len(draft)
            request.num_accepted_tokens += verified.num_accepted
            self.totals.drafts += 1
            self.totals.draft_tokens += len(draft)
            self.totals.accepted_tokens += verified.num_accepted
        speculation.produced(str(request.key), sampled)
        return sampled

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
