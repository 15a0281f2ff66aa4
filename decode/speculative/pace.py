"""How much of each draft a step verifies: as much as gives the most tokens a second.

A step's rows are worth what they will probably give and cost what a longer step costs all:

    rate(k) = (answers + sum of the k best survival probabilities) / seconds(rows + k)

A draft's survival probabilities fall along the draft, so the k best of all requests are a prefix of
each draft. Acceptance and cost are learned (`acceptance`, `step_cost`); no clock is read here.
"""

from __future__ import annotations

from collections.abc import Sequence

from decode.speculative.acceptance import Acceptance
from decode.speculative.step_cost import StepCost
from engine.speculation import Draft

MARGIN = 1.02  # promised gain below which nothing is drafted: costs and chances are estimates
_LEAST = 0.02  # a token with less chance never pays
# Drafting steps in a row before one without drafts, so that it is known what drafts are compared
# with: few as long as nothing is known, then a loss of less than 1 %.
_FIRST_RUN = 4
_LONGEST_RUN = 64


class MeasuredPace:
    """The `Pace` of an engine that measures itself."""

    def __init__(self, acceptance: Acceptance, cost: StepCost) -> None:
        self._acceptance = acceptance
        self._cost = cost
        self._drafts: dict[str, Draft] = {}  # proposed in the step under way
        self._run = 0  # steps with drafts since one without
        self._longest_run = _FIRST_RUN

    def choose(
        self, drafts: Sequence[tuple[str, Draft]], num_rows: int, num_answers: int
    ) -> list[int]:
        """Tokens to verify of each draft; see `Pace`."""
        chances = []
        for i, (request_id, draft) in enumerate(drafts):
            if draft.tokens:
                self._drafts[request_id] = draft
                survival = self._acceptance.survival(request_id, draft.grades, _LEAST)
                chances += [(chance, i) for chance in survival]
        lengths = [0] * len(drafts)
        if not chances:
            self._run = 0
            return lengths
        chances.sort(key=lambda c: -c[0])
        seconds = self._cost.relative(num_rows, len(chances))
        expected = float(num_answers)
        best, best_rate = 0, MARGIN * expected / seconds[0]
        for k, (chance, _) in enumerate(chances, 1):
            expected += chance
            if expected > best_rate * seconds[k]:
                best, best_rate = k, expected / seconds[k]
        if best and self._may_draft():
            for _, i in chances[:best]:
                lengths[i] += 1
        else:
            self._run = 0
        return lengths

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
