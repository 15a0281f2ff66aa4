"""A worker's role bounds what it does for others: prompts a step, answers at once."""

from __future__ import annotations

import pytest

from engine.base.types import RoleBudgets, SamplingParams, StopParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_table import BlockTable
from engine.scheduling.plan import Budgets
from engine.scheduling.request import EngineRequest, Request
from engine.scheduling.scheduler import Scheduler

SIZE = 16
GREEDY = SamplingParams()


def scheduler(prompt_tokens: int, answers: int) -> Scheduler:
    """64 prompt tokens a step and 8 requests, less what the role takes away."""
    made = Scheduler(BlockPool(1000), SIZE, Budgets(64, 8), None, 8192)
    made.set_role_budgets(RoleBudgets(prompt_tokens, answers))
    return made


def queue(made: Scheduler, key: int, num_tokens: int, *, is_answer: bool) -> Request:
    tokens = tuple(range(1000 * key, 1000 * key + num_tokens))
    sampling, stop = (GREEDY, StopParams(9)) if is_answer else (None, None)
    engine_request = EngineRequest("r", tokens, b"salt", sampling, stop)
    request = Request(key, engine_request, BlockTable(made.pool, SIZE), float(key))
    made.add(request)
    return request


def planned(made: Scheduler) -> dict[int, int]:
    """Tokens of the next step, by request."""
    made.admit(0.0)
    return {row.request.key: row.num_tokens for row in made.plan(0.0).rows}


def test_prompts_for_others_have_a_share_of_a_step() -> None:
    made = scheduler(32, 8)
    queue(made, 0, 800, is_answer=False)
    queue(made, 1, 800, is_answer=False)
    assert planned(made) == {0: 32}
    queue(made, 2, 800, is_answer=True)
    assert planned(made) == {0: 32, 2: 32}, "the rest of the step is the worker's own"


def test_a_share_below_a_block_still_advances() -> None:
    made = scheduler(5, 8)
    request = queue(made, 0, 48, is_answer=False)
    total = 0
    while request.num_pending:
        (num_tokens,) = planned(made).values()
        made.advance(request, request.num_computed + num_tokens)
        total += 1
    assert 48 / 5 <= total <= 16


@pytest.mark.parametrize("answers", [1, 3])
def test_answers_wait_for_their_budget_and_prompts_pass_them(answers: int) -> None:
    made = scheduler(64, answers)
    for key in range(5):
        queue(made, key, 20, is_answer=True)
    prompt = queue(made, 5, 32, is_answer=False)
    assert [r.key for r in made.admit(0.0)] == [*range(answers), prompt.key]
    assert made.admit(0.0) == []
    made.remove(made.active[0])
    assert [r.key for r in made.admit(0.0)] == [answers]


def test_a_budget_of_0_keeps_nothing_inside_from_its_end() -> None:
    made = scheduler(0, 0)
    queue(made, 0, 800, is_answer=False)
    queue(made, 1, 20, is_answer=True)
    assert sorted(planned(made)) == [0, 1]


def test_budgets_are_cut_to_the_limits_of_a_step() -> None:
    assert scheduler(999, 999).role_budgets == RoleBudgets(64, 8)
    assert scheduler(0, 1).role_budgets == RoleBudgets(0, 1)
