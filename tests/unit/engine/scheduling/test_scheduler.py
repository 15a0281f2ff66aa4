"""The order of prompts: the shortest first, but none waits for ever."""

from __future__ import annotations

from collections.abc import Iterator

from engine.base.types import SamplingParams, StopParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_table import BlockTable
from engine.scheduling.plan import FIRST_RANK, MAX_SCORED_BESIDE, Budgets
from engine.scheduling.request import EngineRequest, Request
from engine.scheduling.scheduler import Scheduler

AGING = Budgets(64, 8).aging_tokens_per_s


def prompts(*sizes: tuple[int, float]) -> tuple[Scheduler, list[Request]]:
    """A scheduler that has admitted prompts of (tokens, arrival in s), 64 tokens a step."""
    pool = BlockPool(1000)
    scheduler = Scheduler(pool, 16, Budgets(64, 8), None, 8192)
    requests = []
    for key, (num_tokens, arrival_s) in enumerate(sizes):
        tokens = tuple(range(1000 * key, 1000 * key + num_tokens))
        request = Request(key, EngineRequest("r", tokens, b"salt"), BlockTable(pool, 16), arrival_s)
        requests.append(request)
        scheduler.add(request)
    scheduler.admit(0.0)
    return scheduler, requests


def order(scheduler: Scheduler, now_s: float) -> list[int]:
    return [request.key for request in scheduler.plan(now_s).requests]


def test_a_short_prompt_goes_before_a_long_one_that_has_begun() -> None:
    scheduler, (long, short) = prompts((800, 0.0), (64, 0.5))
    scheduler.advance(long, 160)
    assert order(scheduler, 0.5) == [short.key]


def test_what_is_left_of_a_short_budget_goes_to_the_next() -> None:
    scheduler, (_, short) = prompts((800, 0.0), (32, 0.5))
    assert order(scheduler, 0.5) == [short.key, 0]


def test_a_long_prompt_that_has_waited_goes_first() -> None:
    scheduler, (long, _) = prompts((800, 0.0), (64, 2.0 + 736 / AGING))
    assert order(scheduler, 2.0 + 736 / AGING) == [long.key]


def waits(scheduler: Scheduler, key: int, priority: int, arrival_s: float) -> Request:
    tokens = tuple(range(1000 * key, 1000 * key + 16))
    work = EngineRequest("r", tokens, b"salt", priority=priority)
    request = Request(key, work, BlockTable(scheduler.pool, 16), arrival_s)
    scheduler.add(request)
    return request


def admissions(scheduler: Scheduler, first: int, count: int) -> Iterator[Request]:
    """One after the other leaves and gives its place up; a newcomer of priority -9 comes each."""
    for i in range(count):
        for request in scheduler.admit(float(i)):
            yield request
            scheduler.remove(request)
        waits(scheduler, first + i, -9, 100.0 + i)


def test_a_flood_of_a_better_priority_leaves_one_admission_in_four() -> None:
    scheduler = Scheduler(BlockPool(1000), 16, Budgets(64, 1), None, 8192)
    low = [waits(scheduler, i, 5, i / 10) for i in range(5)]
    for i in range(20):
        waits(scheduler, 100 + i, -9, 1.0 + i)
    order = list(admissions(scheduler, 200, 40))
    places = [order.index(request) for request in low]
    assert places == [3, 7, 11, 15, 19]
    assert {request.rank for request in low} == {FIRST_RANK}
    rest = [request for request in order if request not in low]
    assert rest == sorted(rest, key=lambda r: r.arrival_s)
    assert all(request.rank == -9 for request in rest)


def test_equal_priorities_go_by_age_and_keep_their_rank() -> None:
    scheduler = Scheduler(BlockPool(1000), 16, Budgets(64, 1), None, 8192)
    for i in range(10):
        waits(scheduler, i, -9, float(i))
    order = list(admissions(scheduler, 100, 20))
    assert [request.key for request in order[:10]] == list(range(10))
    assert {request.rank for request in order} == {-9}


def test_a_prompt_of_a_worse_priority_is_computed_in_one_plan_of_four() -> None:
    scheduler, (low, high) = prompts((800, 0.0), (800, 1.0))
    low.rank, high.rank = 1, 0
    firsts = [order(scheduler, 1.0)[0] for _ in range(8)]
    assert firsts.count(low.key) == 2


def test_few_positions_are_scored_beside_answers_that_are_written() -> None:
    pool = BlockPool(1000)
    scheduler = Scheduler(pool, 16, Budgets(512, 8), None, 8192)
    sampling, stop = SamplingParams(), StopParams(100)
    for key, num_prompt_logprobs in ((1, 5), (2, None)):
        tokens = tuple(range(1000 * key, 1000 * key + 800))
        work = EngineRequest(
            "r", tokens, b"salt", sampling, stop, num_prompt_logprobs=num_prompt_logprobs
        )
        scheduler.add(Request(key, work, BlockTable(pool, 16), 0.0))
    scorer, answer = scheduler.admit(0.0)
    assert {row.request.key: row.num_tokens for row in scheduler.plan().rows} == {1: 256, 2: 256}
    answer.num_computed = 799
    beside = {row.request.key: row.num_scored for row in scheduler.plan().rows}
    assert beside == {scorer.key: MAX_SCORED_BESIDE, answer.key: 0}


def test_priority_comes_before_length() -> None:
    scheduler, (first, second) = prompts((64, 0.0), (800, 0.0))
    second.rank = -1
    assert order(scheduler, 0.0) == [second.key]
    assert first.key == 0
