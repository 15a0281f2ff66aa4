"""From a step's logits to tokens and log-probabilities. Owned by the engine thread; holds no state.

    logits of a row   | they tell of the prompt | ... | each may give a token |
                      first_scored                    first_sampled

A row that its own request leaves no token (mask, bans, biases, penalties), or whose constraint can
say no more, fails with that request; the others of the step go on. A row whose logits are no
distribution as the model gave them is `broken`: that is the worker's fault, or its blocks'.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch

from engine.base.errors import DiptychError, InvalidRequest
from engine.base.types import TokenLogprobs
from engine.constraints.matcher import Rows
from engine.sampling import Sampler, UnusableLogits
from engine.sampling.logprobs import LogprobScorer
from engine.scheduling.plan import PlannedRow


@dataclass(slots=True)
class SampledRow:
    """A planned row, where its logits lie among the step's, and what came of them."""

    planned: PlannedRow
    first_scored: int
    num_scored: int
    first_sampled: int
    num_sampled: int
    tokens: list[int] = field(default_factory=list)  # the sampler's, at each sampled position
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    error: DiptychError | None = None  # the request's own: it would come anywhere
    broken: bool = False  # what the model computed for it is not finite


class StepSampler:
    """A sampler for answers, and a scorer for those who ask for log-probabilities."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._scorer = LogprobScorer(sampler.vocab_size, sampler.device)

    def draw(
        self,
        plan: Sequence[PlannedRow],
        logits: torch.Tensor,
        masks: Mapping[int, Rows],
        late: Container[int] = (),
    ) -> list[SampledRow]:
        """Of each row of the plan, in its order: tokens, and what the prompt was to tell.

        `masks`: by request key, of constrained answers, a row for each position that may give one.
        The `late` ones give no token.
        """
        rows = _laid_out(plan)
        for row in rows:
            request = row.planned.request
            matcher = request.work.matcher if request.key in masks else None
            if matcher is not None and (reason := matcher.error):
                row.error = InvalidRequest("constraint", reason)
        sampled = [r for r in rows if r.num_sampled and r.planned.request.key not in late]
        self._sample([row for row in sampled if row.error is None], logits, masks)
        for row in rows:
            if row.num_scored and row.error is None and not row.broken:
                self._score(row, logits)
        return rows

    def logprobs(
        self, row: SampledRow, kept: Sequence[int], logits: torch.Tensor
    ) -> list[TokenLogprobs]:
        """Of the tokens that stand, from the raw logits that each was drawn from."""
        wanted = row.planned.request.work.num_logprobs
        if wanted is None or not kept:
            return []
        first = row.first_sampled
        return self._scorer.score(logits[first : first + len(kept)], kept, wanted)

    def _sample(
        self, rows: Sequence[SampledRow], logits: torch.Tensor, masks: Mapping[int, Rows]
    ) -> None:
        owners = [row for row in rows for _ in range(row.num_sampled)]
        if not owners:
            return
        if len(owners) < len(logits):
            ranges = (range(r.first_sampled, r.first_sampled + r.num_sampled) for r in rows)
            logits = logits[list(chain.from_iterable(ranges))]
        wanted = []
        for row in rows:
            request, draft = row.planned.request, row.planned.draft
            mask = masks.get(request.key) if masks else None
            wanted += [
                request.sample_row(draft[:ahead], None if mask is None else mask[ahead])
                for ahead in range(row.num_sampled)
            ]
        while owners:
            try:
                tokens = self._sampler.sample(logits, wanted)
            except UnusableLogits as error:
                if error.broken:  # nothing of this step will be used
                    for index in error.broken:
                        owners[index].broken = True
                    return
                for index in error.rows:
                    owners[index].error = _nothing_left(owners[index])
                keep = [i for i, owner in enumerate(owners) if owner.error is None]
                owners, wanted = [owners[i] for i in keep], [wanted[i] for i in keep]
                logits = logits[keep]
            else:
                for row, token in zip(owners, tokens, strict=True):
                    row.tokens.append(token)
                return

    def _score(self, row: SampledRow, logits: torch.Tensor) -> None:
        request = row.planned.request
        begin = max(request.num_computed, request.num_scored)
        try:
            row.prompt_logprobs = self._scorer.score(
                logits[row.first_scored : row.first_scored + row.num_scored],
                request.tokens[begin + 1 : begin + 1 + row.num_scored],
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


def _laid_out(plan: Sequence[PlannedRow]) -> list[SampledRow]:
    """The rows of a plan, each with where its logits lie."""
    rows, first = [], 0
    for planned in plan:
        end = first + planned.num_logits
        num_sampled = planned.num_sampled
        rows.append(SampledRow(planned, first, planned.num_scored, end - num_sampled, num_sampled))
        first = end
    return rows
