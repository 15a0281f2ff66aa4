"""Chances of drafted tokens: learned by bucket and by request, forgotten with the request."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.speculative.acceptance import Acceptance
from engine.scheduling.speculation import FORCED, PENDING, Draft
from tests.support.drafting import as_drafts, ints, learn, padded, survival


def follow(acceptance: Acceptance, draft_id: int, bucket: int, chance: float, count: int) -> None:
    rng = random.Random(count)
    for _ in range(count):
        token = 7 if rng.random() < chance else 8
        learn(acceptance, draft_id, Draft([7], [bucket]), [token])


def chance_of(acceptance: Acceptance, draft_id: int, bucket: int) -> float:
    return survival(acceptance, draft_id, [bucket], 0.0)[0]


def test_survival_is_the_product_along_the_draft() -> None:
    acceptance = Acceptance([0.5, 0.8])
    assert survival(acceptance, 0, [0, 1, 1], 0.0) == pytest.approx([0.5, 0.4, 0.32])
    assert survival(acceptance, 0, [0, 1, 1], 0.35) == pytest.approx([0.5, 0.4])
    assert survival(acceptance, 0, [], 0.0) == []


@pytest.mark.parametrize("chance", [0.05, 0.3, 0.6, 0.95])
def test_a_bucket_learns_its_acceptance(chance: float) -> None:
    acceptance = Acceptance([0.5, 0.5])
    for i in range(40):  # forty requests of ten tokens
        follow(acceptance, i, 0, chance, 10 + i % 3)
    assert chance_of(acceptance, 99, 0) == pytest.approx(chance, abs=0.15)
    assert chance_of(acceptance, 99, 1) == 0.5


def test_a_request_may_differ_from_the_others() -> None:
    acceptance = Acceptance([0.6, 0.6])
    for _ in range(20):
        follow(acceptance, 1, 0, 1.0, 5)
        follow(acceptance, 2, 0, 0.2, 5)
    assert chance_of(acceptance, 1, 1) > 0.75
    assert chance_of(acceptance, 2, 1) < 0.4
    assert chance_of(acceptance, 99, 1) == pytest.approx(0.6)


def test_tokens_teach_up_to_the_first_that_differs() -> None:
    acceptance = Acceptance([0.5, 0.5, 0.5, 0.5])
    learn(acceptance, 0, Draft([1, 2, 3, 4], [0, 1, 2, 3]), [1, 9, 3, 4])
    acceptance.finish(0)  # what remains is what buckets learned
    chances = [chance_of(acceptance, 0, bucket) for bucket in range(4)]
    assert chances[0] > 0.5 > chances[1]
    assert chances[2:] == [0.5, 0.5]
    # One token came: it tells about the first only. None came: about nothing.
    learn(acceptance, 1, Draft([1, 2], [2, 3]), [1])
    learn(acceptance, 1, Draft([1, 2], [3, 3]), [])
    assert chance_of(acceptance, 3, 2) > 0.5
    assert chance_of(acceptance, 3, 3) == 0.5


def test_probabilities_stay_within_their_limits() -> None:
    acceptance = Acceptance([0.5])
    follow(acceptance, 0, 0, 1.0, 5000)
    assert 0.9 < chance_of(acceptance, 0, 0) < 1.0
    follow(acceptance, 0, 0, 0.0, 5000)
    assert 0.0 < chance_of(acceptance, 0, 0) < 0.1


def test_finish_forgets_the_request() -> None:
    acceptance = Acceptance([0.5])
    follow(acceptance, 0, 0, 1.0, 20)
    acceptance.finish(0)
    acceptance.finish(10**6)
    assert not acceptance._requests.any()


@given(
    rows=st.lists(
        st.lists(
            st.tuples(st.integers(PENDING, 3), st.integers(FORCED, 2), st.integers(0, 3)),
            max_size=6,
        ),
        max_size=8,
    ),
    seed=st.integers(0, 99),
)
def test_kernels_learn_what_python_learns(
    rows: list[list[tuple[int, int, int]]], seed: int
) -> None:
    """Bit for bit, over several steps; some drafts get no token, some fewer than they have."""
    rng = random.Random(seed)
    python, native = (Acceptance([0.3, 0.5, 0.9], native=native) for native in (False, True))
    drafts = as_drafts([Draft([t for t, _, _ in row], [b for _, b, _ in row]) for row in rows])
    for _ in range(3):
        chosen = [row for row in range(len(rows)) if rng.random() < 0.8]
        ids = ints(rng.sample(range(40), len(chosen)))
        came = [[token for _, _, token in rows[row]] + [0] for row in chosen]
        counts = ints([rng.randint(0, len(tokens)) for tokens in came])
        produced = padded(came, max(map(len, came), default=1))
        for acceptance in (python, native):
            acceptance.learn(ids, drafts, ints(chosen), produced, counts)
        assert python._buckets.tobytes() == native._buckets.tobytes()
        assert python._requests.tobytes() == native._requests.tobytes()
