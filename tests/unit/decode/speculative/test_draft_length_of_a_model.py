"""Draft lengths where drafting itself costs passes of a model."""

from __future__ import annotations

from decode.speculative.acceptance import Acceptance
from decode.speculative.draft_length import MeasuredDraftLength
from decode.speculative.step_cost import StepCost
from engine.scheduling.speculation import PENDING, Draft
from tests.support.drafting import as_drafts, choose, ints, produced


def promise(count: int) -> Draft:
    return Draft([PENDING] * count, [0] * count)


def make_with_passes(chance: float, pass_cost: float) -> MeasuredDraftLength:
    """Rows of a step are nearly free; a draft model's pass costs this share of a step."""
    cost, passes = StepCost(), StepCost()
    for _ in range(50):
        for rows in (1, 2, 4, 8, 16, 32):
            cost.observe(rows, 0.01 * (1 + 0.01 * (rows - 1)))
            passes.observe(rows, 0.01 * pass_cost * (1 + 0.01 * (rows - 1)))
    return MeasuredDraftLength(Acceptance([chance]), cost, passes)


def test_passes_of_a_draft_model_count_as_cost() -> None:
    one = {0: promise(16)}
    assert choose(make_with_passes(0.9, 0.01), one, 1, 1)[0] > 10
    # the best of (1 - 0.8 ** (k + 1)) / 0.2 / (1 + 0.26 k) is at 2 and 3
    assert 2 <= choose(make_with_passes(0.8, 0.25), one, 1, 1)[0] <= 3
    assert choose(make_with_passes(0.5, 0.8), one, 1, 1) == [0]
    # A pass serves all answers with drafts, and delays all others.
    eight = {i: promise(16) for i in range(8)}
    assert set(choose(make_with_passes(0.8, 0.25), eight, 8, 8)) <= {2, 3}
    alone = one | {i: Draft([], []) for i in range(1, 8)}
    assert choose(make_with_passes(0.8, 0.25), alone, 8, 8) == [0] * 8


def step(controller: MeasuredDraftLength, tokens: list[int]) -> int:
    """A step with a draft of 4; `tokens` of it come at most. Returns its length."""
    drafts = as_drafts([promise(4)])
    (length,) = controller.choose(ints([0]), drafts, 1, 1).tolist()
    drafts.tokens[0, :length] = 7
    produced(controller, 0, tokens[: length + 1])
    return int(length)


def test_a_draft_model_that_does_not_pay_is_tried_less_and_less() -> None:
    """Tokens that were PENDING and never materialized teach nothing."""
    controller = make_with_passes(0.1, 0.9)
    tried = []
    for number in range(1000):
        if length := step(controller, [1]):
            assert length == 1
            tried.append(number)
    assert 4 <= len(tried) <= 8
    assert tried[0] < 10


def test_a_draft_model_that_gets_better_is_noticed() -> None:
    controller = make_with_passes(0.05, 0.2)
    for _ in range(3000):
        length = step(controller, [7] * 5)
    assert length >= 2
