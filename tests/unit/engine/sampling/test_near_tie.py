"""The excuse of law 1 is given where rounding decides, and nowhere else."""

from __future__ import annotations

import math

import pytest
import torch

from engine.base.types import SamplingParams
from engine.sampling import Sampler, SampleRow
from engine.sampling.philox import gumbel_row
from tests.support.near_tie import BOUND, Outcome, Tally, compare, near_tie, possible_tokens
from tests.support.random_rows import random_batch

GREEDY = SampleRow(SamplingParams(), 1, [0], 1)
LOG_HALF = math.log(0.5)


def _favours(token: int) -> int:
    """A seed whose noise at position 1 lets `token` of two win by more than 2.5."""
    for seed in range(10_000):
        noise = gumbel_row(seed, 1, 2)
        if noise[token] - noise[1 - token] > 2.5:
            return seed
    raise AssertionError


def _row(seed: int, **params: float) -> SampleRow:
    return SampleRow(SamplingParams(**{"temperature": 1.0, "seed": seed, **params}), 1, [0], 1)


def test_the_bound_is_the_law_s() -> None:
    assert BOUND == 1e-3


def test_greedy() -> None:
    assert near_tie(torch.tensor([1.0, 1.0009, 0.0]), GREEDY)
    assert not near_tie(torch.tensor([1.0, 1.0011, 0.0]), GREEDY)
    assert possible_tokens(torch.tensor([1.0, 1.0009, 0.9]), GREEDY) == {0, 1}


def test_scores_include_the_noise() -> None:
    noise = gumbel_row(5, 1, 2)
    gap = float(noise[0] - noise[1])
    assert near_tie(torch.tensor([0.0, gap + 0.0009]), _row(5))
    assert not near_tie(torch.tensor([0.0, gap + 0.0011]), _row(5))
    # Scores are of scaled logits: at T = 2 the same gap of logits is half the gap of scores.
    assert near_tie(torch.tensor([0.0, 2 * gap + 0.0018]), _row(5, temperature=2.0))


@pytest.mark.parametrize(
    ("params", "logits", "expected"),
    [
        ({"top_k": 1}, [0.0, -0.0009], {0, 1}),
        ({"top_k": 1}, [0.0, -0.0011], {0}),
        ({"top_k": 1}, [-0.0009, 0.0], {0, 1}),
        ({"top_k": 1}, [-0.0011, 0.0], {1}),
        ({"min_p": 0.5}, [0.0, LOG_HALF + 0.0009], {0, 1}),
        ({"min_p": 0.5}, [0.0, LOG_HALF - 0.0009], {0, 1}),
        ({"min_p": 0.5}, [0.0, LOG_HALF + 0.0011], {1}),
        ({"min_p": 0.5}, [0.0, LOG_HALF - 0.0011], {0}),
        ({"top_p": 0.6}, [math.log(0.6009), math.log(0.3991)], {0, 1}),
        ({"top_p": 0.6}, [math.log(0.5991), math.log(0.4009)], {0, 1}),
        ({"top_p": 0.6}, [math.log(0.6011), math.log(0.3989)], {0}),
        ({"top_p": 0.6}, [math.log(0.5989), math.log(0.4011)], {1}),
        # Far from the cut in probability, but the two could change places at it.
        ({"top_p": 0.3}, [0.0, 0.0009], {0, 1}),
        ({"top_p": 0.3}, [0.0009, 0.0], {0, 1}),
        ({"top_p": 0.3}, [0.0, 0.0011], {1}),
        ({"top_p": 1e-4}, [1.0, 0.0], {0}),
    ],
)
def test_a_cut_near_the_token_that_noise_favours(
    params: dict[str, float], logits: list[float], expected: set[int]
) -> None:
    """Token 1 wins by its noise if it is kept at all."""
    assert possible_tokens(torch.tensor(logits), _row(_favours(1), **params)) == expected


@pytest.mark.parametrize("logit", [LOG_HALF + 0.0005, LOG_HALF - 0.0005])
def test_a_cut_near_a_loser_excuses_nothing(logit: float) -> None:
    assert not near_tie(torch.tensor([0.0, logit]), _row(_favours(0), min_p=0.5))


def test_the_sampler_s_token_is_possible_and_mostly_alone() -> None:
    logits, rows = random_batch(20, 400)
    tokens = Sampler(logits.shape[1]).sample(logits, rows)
    possible = [possible_tokens(x, row) for x, row in zip(logits, rows, strict=True)]
    assert all(token in them for token, them in zip(tokens, possible, strict=True))
    assert sum(len(them) > 1 for them in possible) < 20


def test_compare_excuses_only_what_rounding_allows() -> None:
    tied, clear = torch.tensor([1.0, 1.0005, 0.0]), torch.tensor([1.0, 2.0, 0.0])

    def judge(oracle: list[int], got: list[int]) -> tuple[Outcome, int | None]:
        verdict = compare(oracle, got, lambda i: ([clear, tied][i], GREEDY), tally=tally)
        return verdict.outcome, verdict.at

    tally = Tally()
    assert judge([1, 1], [1, 1]) == (Outcome.EQUAL, None)
    assert judge([1, 1], [1, 0]) == (Outcome.EXCUSED, 1)
    assert judge([1, 1], [1, 2]) == (Outcome.DIFFERENT, 1)  # near a tie, but not one of the two
    assert judge([1, 1], [0, 1]) == (Outcome.DIFFERENT, 0)
    assert judge([1, 1], [1]) == (Outcome.DIFFERENT, 1)
    assert (tally.num_answers, tally.num_tokens, len(tally.excused)) == (5, 8, 1)
    assert "8 tokens of 5 answers compared, 1 near-ties excused" in str(tally)
