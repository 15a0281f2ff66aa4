"""How much of each draft a step verifies: as much as gives the most tokens a second.

The rows of a step are worth their expected tokens, and cost all requests the longer step:

    rate(k) = (answers + sum of the k best survival probabilities) / seconds(rows + k)

A draft's survival probabilities fall along the draft, so the k best of all requests are a prefix of
each draft. Acceptance and cost are learned (`acceptance`, `step_cost`); no clock is read here.

Where a model drafts, its forward passes are added to the seconds: the i-th has a row for each
request that drafts at least i tokens. The value of such a drafter is known only while it drafts;
where that does not pay, a token is drafted for all requests now and then.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from decode.speculative.acceptance import Acceptance
from decode.speculative.step_cost import StepCost
from engine.scheduling.speculation import Drafts, Ints, Tokens, grown

Floats = NDArray[np.float64]
MARGIN = 1.02  # least expected gain of drafting: costs and chances are estimates
# A step may take so many times as long as without drafts. More would give a few more tokens a
# second, in bursts: all answers wait for the longest step.
LONGEST_STEP = 5.0
# And so many times as long for each token that the answer with the least to expect gets in it:
# one answer's gain must not be another's loss.
SHARED_STEP = 1.4
_LEAST = 0.02  # a token with less chance never pays
_GROWTH = 2  # times the largest step so far: what is not known is not tried in one leap
# Drafting steps in a row before one without drafts, so that it is known what drafts are compared
# with: few as long as nothing is known, then a loss of less than 1 %.
_FIRST_RUN = 4
_LONGEST_RUN = 64
# Steps that drafting did not pay in, before it is tried nevertheless.
_FIRST_PAUSE = 8
_LONGEST_PAUSE = 256


class MeasuredDraftLength:
    """The `DraftLengthController` of an engine that measures itself."""

    def __init__(
        self, acceptance: Acceptance, cost: StepCost, drafting: StepCost | None = None
    ) -> None:
        """`drafting`: cost of one pass of a draft model, observed by its drafter."""
        self._acceptance = acceptance
        self._cost = cost
        self._drafting = drafting
        self._drafts = Drafts.empty(0, 0)  # proposed in the step under way
        self._row_of = np.zeros(16, np.int64)  # 1 + the row of these, by draft id; 0: none
        self._run = 0  # steps with drafts since one without
        self._longest_run = _FIRST_RUN
        self._num_idle = 0  # steps since drafts that cost something were made
        self._pause = _FIRST_PAUSE

    def choose(self, ids: Ints, drafts: Drafts, num_rows: int, num_answers: int) -> Ints:
        """Tokens to verify of each draft; see `DraftLengthController`."""
        self._drafts = drafts
        self._row_of = grown(self._row_of, int(ids.max(initial=-1)) + 1)
        self._row_of[:] = 0
        self._row_of[ids] = np.arange(1, len(ids) + 1)
        if not drafts.lengths.any():
            self._run = 0
            return drafts.lengths
        survival = self._acceptance.survival(ids, drafts, _LEAST)
        owners, _ = survival.nonzero()
        chances = survival[survival > 0.0]
        most = _GROWTH * max(self._cost.most_rows, num_rows) - num_rows
        likeliest = np.argsort(-chances)[:most]
        owners, chances = owners[likeliest], chances[likeliest]
        best = self._best(chances, owners, num_rows, num_answers)
        if best:
            self._num_idle, self._pause = 0, _FIRST_PAUSE
        if best and self._may_draft():
            return np.bincount(owners[:best], minlength=len(ids))
        self._run = 0
        shortest = np.minimum(1, drafts.lengths)
        if self._drafting is not None and shortest.any() and not best and self._tries():
            return shortest
        return np.zeros_like(shortest)

    def _best(self, chances: Floats, owners: Ints, num_rows: int, num_answers: int) -> int:
        """How many of the tokens pay; the likeliest come first, each with its draft."""
        if not len(chances):
            return 0
        seconds = self._cost.relative(num_rows, len(chances))
        if self._drafting is not None:
            seconds += self._passes(self._drafting, owners)
        longer = seconds[1:] / seconds[0]
        rate = (num_answers + np.cumsum(chances)) / seconds[1:]
        pays = (longer <= LONGEST_STEP) & (rate > MARGIN * num_answers / seconds[0])
        if num_answers > 1 and longer[-1] > SHARED_STEP:
            pays &= longer <= SHARED_STEP * (1.0 + _least(chances, owners, num_answers))
        return 1 + int(np.where(pays, rate, 0.0).argmax()) if pays.any() else 0

    def _passes(self, drafting: StepCost, owners: Ints) -> Floats:
        """Cost of drafting the first 0, 1, 2, ... of these tokens, in the units of a step's."""
        out = np.zeros(len(owners) + 1)
        if not (drafting.unit_s and self._cost.unit_s):
            return out  # unknown: find out
        num_drafts = int(owners.max()) + 1
        of_rows = np.concatenate([[0.0], drafting.relative(1, num_drafts)])
        # The i-th pass has a row for each draft of at least i tokens.
        row = _occurrence(_occurrence(owners))
        out[1:] = np.cumsum(of_rows[row + 1] - of_rows[row])
        return out * (drafting.unit_s / self._cost.unit_s)

    def _tries(self) -> bool:
        """True now and then; see `_FIRST_PAUSE`."""
        self._num_idle += 1
        if self._num_idle < self._pause:
            return False
        self._num_idle, self._pause = 0, min(2 * self._pause, _LONGEST_PAUSE)
        return True

    def _may_draft(self) -> bool:
        """False now and then; see `_LONGEST_RUN`."""
        self._run += 1
        if self._run <= self._longest_run:
            return True
        self._longest_run = min(2 * self._longest_run, _LONGEST_RUN)
        return False

    def produced(self, ids: Ints, tokens: Tokens, counts: Ints) -> None:
        """Learn from what came where a draft was proposed."""
        self._row_of = grown(self._row_of, int(ids.max(initial=-1)) + 1)
        rows = self._row_of[ids] - 1
        self._row_of[ids] = 0
        known = rows >= 0
        self._acceptance.learn(ids[known], self._drafts, rows[known], tokens[known], counts[known])

    def stepped(self, num_rows: int, seconds: float) -> None:
        """Learn what a step of so many rows costs."""
        self._cost.observe(num_rows, seconds)

    def finish(self, draft_id: int) -> None:
        """Forget the request."""
        self._row_of[draft_id : draft_id + 1] = 0
        self._acceptance.finish(draft_id)


def _least(chances: Floats, owners: Ints, num_answers: int) -> Floats | float:
    """Of the answer that gets least from the first 1, 2, ... tokens: beside one token, the most
    to expect.
    """
    if len(np.unique(owners)) < num_answers:
        return 0.0
    of_each = np.zeros((num_answers, len(owners)))
    of_each[owners, np.arange(len(owners))] = chances
    least: Floats = np.cumsum(of_each, axis=1).min(axis=0)
    return least


def _occurrence(values: Ints) -> Ints:
    """Of each value, how many equal ones come before it."""
    order = np.argsort(values, kind="stable")
    begins = np.flatnonzero(np.append(True, np.diff(values[order]) != 0))
    out = np.empty_like(order)
    out[order] = np.arange(len(order)) - np.repeat(begins, np.diff(np.append(begins, len(order))))
    return out
