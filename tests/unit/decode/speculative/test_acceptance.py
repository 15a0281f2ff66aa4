"""Chances of drafted tokens: learned by bucket and by request, forgotten with the request."""

from __future__ import annotations

import random

import pytest

from decode.speculative.acceptance import Acceptance
from engine.scheduling.speculation import Draft


def follow(acceptance: Acceptance, request_id: str, bucket: int, chance: float, count: int) -> None:
    rng = random.Random(count)
    for _ in range(count):
        token = 7 if rng.random() < chance else 8
        acceptance.learn(request_id, Draft([7], [bucket]), [token])


def chance_of(acceptance: Acceptance, request_id: str, bucket: int) -> float:
    return acceptance.survival(request_id, [bucket], 0.0)[0]


def test_survival_is_the_product_along_the_draft() -> None:
    acceptance = Acceptance([0.5, 0.8])
    assert acceptance.survival("a", [0, 1, 1], 0.0) == pytest.approx([0.5, 0.4, 0.32])
    assert acceptance.survival("a", [0, 1, 1], 0.35) == pytest.approx([0.5, 0.4])
    assert acceptance.survival("a", [], 0.0) == []


@pytest.mark.parametrize("chance", [0.05, 0.3, 0.6, 0.95])
def test_a_bucket_learns_its_acceptance(chance: float) -> None:
    acceptance = Acceptance([0.5, 0.5])
    for i in range(40):  # forty requests of ten tokens
        follow(acceptance, f"r{i}", 0, chance, 10 + i % 3)
    assert chance_of(acceptance, "new", 0) == pytest.approx(chance, abs=0.15)
    assert chance_of(acceptance, "new", 1) == 0.5


def test_a_request_may_differ_from_the_others() -> None:
    acceptance = Acceptance([0.6, 0.6])
    for _ in range(20):
        follow(acceptance, "good", 0, 1.0, 5)
        follow(acceptance, "bad", 0, 0.2, 5)
    assert chance_of(acceptance, "good", 1) > 0.75
    assert chance_of(acceptance, "bad", 1) < 0.4
    assert chance_of(acceptance, "new", 1) == pytest.approx(0.6)


def test_tokens_teach_up_to_the_first_that_differs() -> None:
    acceptance = Acceptance([0.5, 0.5, 0.5, 0.5])
    acceptance.learn("a", Draft([1, 2, 3, 4], [0, 1, 2, 3]), [1, 9, 3, 4])
    acceptance.finish("a")  # what remains is what buckets learned
    chances = [chance_of(acceptance, "a", bucket) for bucket in range(4)]
    assert chances[0] > 0.5 > chances[1]
    assert chances[2:] == [0.5, 0.5]
    # One token came: it tells about the first only. None came: about nothing.
    acceptance.learn("b", Draft([1, 2], [2, 3]), [1])
    acceptance.learn("b", Draft([1, 2], [3, 3]), [])
    assert chance_of(acceptance, "c", 2) > 0.5
    assert chance_of(acceptance, "c", 3) == 0.5


def test_probabilities_stay_within_their_limits() -> None:
    acceptance = Acceptance([0.5])
    follow(acceptance, "a", 0, 1.0, 5000)
    assert 0.9 < chance_of(acceptance, "a", 0) < 1.0
    follow(acceptance, "a", 0, 0.0, 5000)
    assert 0.0 < chance_of(acceptance, "a", 0) < 0.1


def test_finish_forgets_the_request() -> None:
    acceptance = Acceptance([0.5])
    follow(acceptance, "a", 0, 1.0, 20)
    acceptance.finish("a")
    acceptance.finish("never seen")
    assert not acceptance._requests
