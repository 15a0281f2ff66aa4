"""From a step's logits to tokens and log-probabilities. Owned by the engine thread; has no state.

    logits of a row   | they score the prompt | ... | each may give a token |
                      first_scored                  first_sampled

A row that its request leaves no token (mask, bans, biases, penalties), or whose constraint failed,
ends with that request; the others of the step go on. A row whose logits are no distribution as the
model gave them is `broken`: that is the fault of the worker, or of its blocks.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray

from engine.attention.batch import ranges
from engine.base.errors import DiptychError, InvalidRequest
from engine.base.types import TokenLogprobs
from engine.constraints.matcher import Rows
from engine.sampling import Sampler, SampleRow, UnusableLogits
from engine.sampling.logprobs import LogprobScorer
from engine.scheduling.plan import Plan, PlannedRow
from engine.scheduling.request import Request
from engine.scheduling.slots import DecodeSlots

NO_TOKENS: NDArray[np.int32] = np.empty(0, np.int32)


@dataclass(slots=True)
class SampledRow:
    """A planned row, where its logits are among the step's, and its results."""

    planned: PlannedRow
    first_scored: int
    first_sampled: int
    tokens: Sequence[int] = ()  # the sampler's, at each sampled position
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    error: DiptychError | None = None  # the request's own: any worker would give it
    broken: bool = False  # the model's numbers for it are not finite


@dataclass(frozen=True, slots=True)
class Sampled:
    """The results of a step's logits."""

    tokens: NDArray[np.int32]  # of each slot, after each prefix of its draft: [its logits]
    rows: Sequence[SampledRow]
    broken: list[Request]  # the model's numbers for them are not finite; nothing is accepted


class StepSampler:
    """A sampler for answers, and a scorer for requests with log-probabilities."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._scorer = LogprobScorer(sampler.vocab_size, sampler.device)

    def sample(
        self, plan: Plan, logits: torch.Tensor, masks: Mapping[int, Rows], late: Container[int] = ()
    ) -> Sampled:
        """The tokens of slots and rows, in the plan's order, and the prompt's log-probabilities.

        `masks`: by request key, of constrained answers, a row for each position that may give a
        token. The `late` ones give no token.
        """
        tokens, broken = self._sample_slots(plan.slots, logits)
        if not plan.rows:
            return Sampled(tokens, (), broken)
        rows = _laid_out(plan)
        for row in rows if masks else ():
            request = row.planned.request
            matcher = request.work.matcher if request.key in masks else None
            if matcher is not None and (reason := matcher.error):
                row.error = InvalidRequest("constraint", reason)
        self._sample(
            [
                row
                for row in rows
                if row.planned.num_sampled
                and row.error is None
                and (not late or row.planned.request.key not in late)
            ],
            logits,
            masks,
            plan.num_slot_logits,
        )
        for row in rows:
            if row.planned.num_scored and row.error is None and not row.broken:
                self._score(row, logits)
        return Sampled(tokens, rows, broken + [r.planned.request for r in rows if r.broken])

    def logprobs(
        self, row: SampledRow, kept: Sequence[int], logits: torch.Tensor
    ) -> list[TokenLogprobs]:
        """Of the kept tokens, from the raw logits that each was sampled from."""
        first, num_top = row.first_sampled, row.planned.request.work.num_logprobs or 0
        return self._scorer.score(logits[first : first + len(kept)], kept, num_top)

    def _sample_slots(
        self, slots: DecodeSlots, logits: torch.Tensor
    ) -> tuple[NDArray[np.int32], list[Request]]:
        """The slots' tokens, and the requests whose logits are unusable as the model gave."""
        count = len(slots)
        num_logits = slots.num_draft + 1
        positions = ranges(slots.length[:count], num_logits)
        if len(positions) < logits.shape[0]:
            logits = logits[: len(positions)]
        try:
            return self._sampler.sample_plain(logits, slots.params, positions, num_logits), []
        except UnusableLogits as error:
            owners = np.repeat(np.arange(count), num_logits)
            return NO_TOKENS, [slots.requests[i] for i in np.unique(owners[list(error.rows)])]

    def _sample(
        self,
        rows: Sequence[SampledRow],
        logits: torch.Tensor,
        masks: Mapping[int, Rows],
        first: int,
    ) -> None:
        owners: list[SampledRow] = []  # of each row of logits
        sample_rows: list[SampleRow] = []
        for row in rows:
            planned = row.planned
            request, draft = planned.request, planned.draft
            mask = masks.get(request.key) if masks else None
            for ahead in range(len(draft) + 1):
                owners.append(row)
                allowed = None if mask is None else mask[ahead]
                sample_rows.append(request.sample_row(draft[:ahead], allowed))
        if len(owners) == len(logits) - first:
            logits = logits[first:]
        else:
            ranges = (range(r.first_sampled, r.first_sampled + r.planned.num_sampled) for r in rows)
            logits = logits[list(chain.from_iterable(ranges))]
        while owners:
            try:
                tokens = self._sampler.sample(logits, sample_rows)
            except UnusableLogits as error:
                if error.broken:  # nothing of this step will be used
                    for index in error.broken:
                        owners[index].broken = True
                    return
                for index in error.rows:
                    owners[index].error = _nothing_left(owners[index])
                keep = [i for i, owner in enumerate(owners) if owner.error is None]
                owners = [owners[i] for i in keep]
                sample_rows = [sample_rows[i] for i in keep]
                logits = logits[keep]
            else:
                first = 0
                while first < len(owners):
                    row = owners[first]
                    end = first + len(row.planned.draft) + 1
                    row.tokens = tokens[first:end]
                    first = end
                return

    def _score(self, row: SampledRow, logits: torch.Tensor) -> None:
        request, num_scored = row.planned.request, row.planned.num_scored
        begin = max(request.num_computed, request.num_scored)
        try:
            row.prompt_logprobs = self._scorer.score(
                logits[row.first_scored : row.first_scored + num_scored],
                request.tokens[begin + 1 : begin + 1 + num_scored],
                request.work.num_prompt_logprobs or 0,
            )
        except UnusableLogits:
            row.broken = True


def _nothing_left(row: SampledRow) -> InvalidRequest:
    """The error of a request that forbids every token that the model could write next."""
    sampling = row.planned.request.work.sampling
    biased = sampling is not None and sampling.logit_bias
    field = "sampling.logit_bias" if biased else "sampling"
    return InvalidRequest(
        field, "no token is left: constraint, min_tokens, biases and penalties forbid each one"
    )


def _laid_out(plan: Plan) -> list[SampledRow]:
    """The rows of a plan, each with the place of its logits: those of the slots come first."""
    rows, first = [], plan.num_slot_logits
    for planned in plan.rows:
        end = first + planned.num_logits
        rows.append(SampledRow(planned, first, end - planned.num_sampled))
        first = end
    return rows
