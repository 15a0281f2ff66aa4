"""The order of prompts: the shortest first, but none waits for ever."""

from __future__ import annotations

from engine.cache.block_pool import BlockPool
from engine.cache.block_table import BlockTable
from engine.request import Request, Work
from engine.scheduler import Budgets, Scheduler

AGING = Budgets(64, 8).aging_tokens_per_s


def prompts(*sizes: tuple[int, float]) -> tuple[Scheduler, list[Request]]:
    """A scheduler that has admitted prompts of (tokens, arrival in s), 64 tokens a step."""
    pool = BlockPool(1000)
    scheduler = Scheduler(pool, 16, Budgets(64, 8), None, 8192)
    requests = []
    for key, (num_tokens, arrival_s) in enumerate(sizes):
        tokens = tuple(range(1000 * key, 1000 * key + num_tokens))
        request = Request(key, Work("r", tokens, b"salt"), BlockTable(pool, 16), arrival_s)
        requests.append(request)
        scheduler.add(request)
    scheduler.admit(0.0)
    return scheduler, requests


def order(scheduler: Scheduler, now_s: float) -> list[int]:
    return [row.request.key for row in scheduler.plan(now_s)]


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


def test_priority_comes_before_length() -> None:
    scheduler, (first, second) = prompts((64, 0.0), (800, 0.0))
    object.__setattr__(second, "work", Work("r", second.work.prompt, b"salt", priority=-1))
    assert order(scheduler, 0.0) == [second.key]
    assert first.key == 0
