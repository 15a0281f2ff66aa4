"""Prompt lookup against a plain rescan of the history."""

from __future__ import annotations

import random
import time

import pytest

from decode.speculative.base import NoDrafter
from decode.speculative.ngram import NgramDrafter
from engine.speculation import Drafter


def rescan(tokens: list[int], max_tokens: int, min_n: int, max_n: int) -> list[int]:
    """The same by definition: longest suffix first, its most recent earlier occurrence."""
    for n in range(min(max_n, len(tokens) - 1), min_n - 1, -1):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                period = tokens[end:]
                return [period[i % len(period)] for i in range(max_tokens)]
    return []


@pytest.mark.parametrize(("min_n", "max_n"), [(1, 1), (2, 4), (1, 5), (3, 3)])
def test_equals_a_rescan_at_every_step(min_n: int, max_n: int) -> None:
    rng = random.Random(min_n * 10 + max_n)
    drafter: Drafter = NgramDrafter(min_n, max_n)
    num_drafts = 0
    for request in range(30):
        tokens = [rng.randrange(5) for _ in range(rng.randrange(0, 40))]
        for _ in range(25):
            size = rng.randrange(0, 7)
            draft = drafter.propose(f"r{request}", tokens, size)
            assert draft == rescan(tokens, size, min_n, max_n)
            num_drafts += bool(draft)
            tokens = tokens + [rng.randrange(5) for _ in range(rng.randrange(0, 4))]
    assert num_drafts > 100


def test_what_followed_last_time() -> None:
    drafter = NgramDrafter()
    assert drafter.propose("r", [1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 3) == [8, 1, 2]
    assert drafter.propose("s", [1, 2, 3, 4, 9, 3, 4, 7, 2, 3, 4], 2) == [
        9,
        3,
    ]  # longest before latest
    assert drafter.propose("t", [1, 2, 3, 4], 4) == []
    assert drafter.propose("u", [], 4) == []
    assert drafter.propose("v", [5, 6, 5, 6, 5], 6) == [6, 5, 6, 5, 6, 5]


def test_equal_hashes_are_not_enough() -> None:
    """Python hashes integers modulo 2**61 - 1, so these two pairs collide."""
    big = 2**61 - 1
    assert hash((big, 5)) == hash((0, 5))
    assert NgramDrafter(2, 2).propose("r", [big, 5, 7, 0, 5], 1) == []


def test_requests_do_not_see_each_other() -> None:
    drafter = NgramDrafter()
    drafter.propose("a", [1, 2, 3, 4, 1, 2], 2)
    assert drafter.propose("b", [1, 2], 2) == []
    drafter.finish("a")
    drafter.finish("never seen")
    assert drafter.propose("a", [1, 2], 2) == []


def test_a_request_may_come_back() -> None:
    """Preempted and resumed with the same tokens, or reused after finish with others: no stale
    end."""
    drafter = NgramDrafter()
    tokens = [1, 2, 3, 1, 2, 3, 1, 2]
    first = drafter.propose("r", tokens, 4)
    assert drafter.propose("r", list(tokens), 4) == first
    assert drafter.propose("r", [7, 8], 4) == []
    assert drafter.propose("r", [7, 8, 9, 7, 8], 2) == [9, 7]
    drafter.finish("r")
    assert drafter.propose("r", [4, 5, 6, 4, 5], 1) == [6]


def test_a_step_does_not_cost_the_history() -> None:
    rng = random.Random(3)
    tokens = [rng.randrange(50_000) for _ in range(100_000)]
    drafter = NgramDrafter()
    drafter.propose("r", tokens, 4)
    start = time.perf_counter()
    for _ in range(200):
        tokens.append(rng.randrange(50_000))
        drafter.propose("r", tokens, 4)
    per_step_s = (time.perf_counter() - start) / 200
    assert per_step_s < 1e-3  # indexing the history anew takes 100 times as long


def test_bad_sizes_are_refused() -> None:
    for sizes in ((0, 3), (4, 3)):
        with pytest.raises(ValueError, match="min_n"):
            NgramDrafter(*sizes)


def test_none_proposes_nothing() -> None:
    drafter: Drafter = NoDrafter()
    assert drafter.propose("r", [1, 2, 1, 2], 4) == []
    drafter.finish("r")
    assert (drafter.name, NgramDrafter().name) == ("none", "ngram")
