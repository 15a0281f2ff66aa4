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

from collections.abc import Sequence

from decode.speculative.acceptance import Acceptance
from decode.speculative.step_cost import StepCost
from engine.scheduling.speculation import Draft

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
        self._drafts: dict[str, Draft] = {}  # proposed in the step under way
        self._run = 0  # steps with drafts since one without
        self._longest_run = _FIRST_RUN
        self._num_idle = 0  # steps since drafts that cost something were made
        self._pause = _FIRST_PAUSE

    def choose(
        self, drafts: Sequence[tuple[str, Draft]], num_rows: int, num_answers: int
    ) -> list[int]:
        """Tokens to verify of each draft; see `DraftLengthController`."""
        chances = []
        for i, (request_id, draft) in enumerate(drafts):
            if draft.tokens:
                self._drafts[request_id] = draft
                survival = self._acceptance.survival(request_id, draft.buckets, _LEAST)
                chances += [(chance, i) for chance in survival]
        lengths = [0] * len(drafts)
        best = self._best(chances, num_rows, num_answers)
        if best:
            self._num_idle, self._pause = 0, _FIRST_PAUSE
        if best and self._may_draft():
            for _, i in chances[:best]:
                lengths[i] += 1
        else:
            self._run = 0
            shortest = [min(1, len(draft.tokens)) for _, draft in drafts]
            if self._drafting is not None and any(shortest) and not best and self._tries():
                lengths = shortest
        return lengths

    def _best(self, chances: list[tuple[float, int]], num_rows: int, num_answers: int) -> int:
        """How many of the (chance, draft) pairs pay; sorts them, the likeliest first."""
        if not chances:
            return 0
        chances.sort(key=lambda c: -c[0])
        del chances[_GROWTH * max(self._cost.most_rows, num_rows) - num_rows :]
        seconds = self._cost.relative(num_rows, len(chances))
        if self._drafting is not None:
            passes = self._passes(self._drafting, [i for _, i in chances])
            seconds = [a + b for a, b in zip(seconds, passes, strict=True)]
        expected = float(num_answers)
        of_each: dict[int, float] = {}  # tokens to expect beside the one without drafts
        best, best_rate = 0, MARGIN * expected / seconds[0]
        for k, (chance, i) in enumerate(chances, 1):
            of_each[i] = of_each.get(i, 0.0) + chance
            longer = seconds[k] / seconds[0]
            if longer > LONGEST_STEP:
                break
            expected += chance
            if expected <= best_rate * seconds[k]:
                continue
            least = min(of_each.values()) if len(of_each) == num_answers else 0.0
            if longer <= SHARED_STEP * (1.0 + least) or num_answers == 1:
                best, best_rate = k, expected / seconds[k]
        return best

    def _passes(self, drafting: StepCost, owners: Sequence[int]) -> list[float]:
        """Cost of drafting the first 0, 1, 2, ... of these tokens, in the units of a step's."""
        if not (drafting.unit_s and self._cost.unit_s):
            return [0.0] * (len(owners) + 1)  # unknown: find out
        unit = drafting.unit_s / self._cost.unit_s
        of_rows = [0.0, *drafting.relative(1, max(owners))]
        lengths = [0] * (max(owners) + 1)
        num_rows = [0] * (len(owners) + 1)  # of each pass
        out = [0.0]
        for i in owners:
            now = num_rows[lengths[i]]
            out.append(out[-1] + unit * (of_rows[now + 1] - of_rows[now]))
            num_rows[lengths[i]] += 1
            lengths[i] += 1
        return out

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

    def produced(self, request_id: str, tokens: Sequence[int]) -> None:
        """Learn from what came where a draft was proposed."""
        draft = self._drafts.pop(request_id, None)
        if draft is not None:
            self._acceptance.learn(request_id, draft, tokens)

    def stepped(self, num_rows: int, seconds: float) -> None:
        """Learn what a step of so many rows costs."""
        self._cost.observe(num_rows, seconds)

    def finish(self, request_id: str) -> None:
        """Forget the request."""
        self._drafts.pop(request_id, None)
        self._acceptance.finish(request_id)
