"""Log-probabilities in C and in torch: of raw logits, ties to the lowest id, rows on their own."""

from __future__ import annotations

import math

import pytest
import torch

from engine.kernels import kernels
from engine.sampling import UnusableLogits
from engine.sampling.logprobs import LogprobScorer

WAYS = [
    pytest.param(True, marks=pytest.mark.skipif(kernels() is None, reason="no native kernels")),
    False,
]


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("vocab_size", [1, 5, 16, 33, 1000, 49152])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
def test_equal_to_log_softmax(native: bool, vocab_size: int, num_top: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size + num_top)
    logits = 12 * torch.randn(7, vocab_size, generator=generator)
    tokens = torch.randint(vocab_size, (7,), generator=generator)
    got = LogprobScorer(vocab_size, native=native).score(logits, tokens.tolist(), num_top)
    exact = logits.double().log_softmax(1)
    best = exact.topk(min(num_top, vocab_size))
    for row, scored in enumerate(got):
        assert scored.chosen == pytest.approx(float(exact[row, tokens[row]]), abs=5e-6)
        assert scored.token_ids == tuple(best.indices[row].tolist())
        assert scored.logprobs == pytest.approx(best.values[row].tolist(), abs=5e-6)


@pytest.mark.parametrize("native", WAYS)
def test_of_equals_the_lowest_id_comes_first(native: bool) -> None:
    logits = torch.zeros(2, 100)
    logits[0, [90, 7, 41]] = 3.0
    logits[0, [88, 2]] = 2.0
    got = LogprobScorer(100, native=native).score(logits, [7, 0], 6)
    assert got[0].token_ids == (7, 41, 90, 2, 88, 0)
    assert got[0].chosen == got[0].logprobs[0] == got[0].logprobs[2]
    assert got[1].token_ids == (0, 1, 2, 3, 4, 5)
    assert got[1].chosen == pytest.approx(-math.log(100))


@pytest.mark.parametrize("native", WAYS)
def test_rising_logits_and_impossible_tokens(native: bool) -> None:
    logits = torch.arange(500, dtype=torch.float32)[None].repeat(2, 1)
    logits[1, 10:] = -torch.inf
    first, second = LogprobScorer(500, native=native).score(logits, [499, 400], 12)
    assert first.token_ids == tuple(range(499, 487, -1))
    assert second.chosen == -math.inf
    assert second.token_ids[:10] == tuple(range(9, -1, -1))
    assert second.logprobs[10:] == (-math.inf, -math.inf)


@pytest.mark.parametrize("native", WAYS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_rows_that_are_no_distribution_are_named(native: bool, poison: float) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    logits[1, 30] = poison
    logits[3] = -torch.inf
    with pytest.raises(UnusableLogits) as caught:
        LogprobScorer(50, native=native).score(logits, [0, 0, 0, 0], 3)
    assert caught.value.rows == (1, 3)


@pytest.mark.skipif(kernels() is None, reason="no native kernels")
def test_a_row_is_scored_the_same_alone_strided_and_in_any_company() -> None:
    logits = 5 * torch.randn(6, 1000, generator=torch.Generator().manual_seed(2))
    scorer = LogprobScorer(1000)
    together = scorer.score(logits, [5, 6, 7, 8, 9, 10], 20)
    for row in range(6):
        assert scorer.score(logits[row : row + 1], [5 + row], 20) == [together[row]]
    wide = torch.empty(6, 1600)
    wide[:, :1000] = logits
    assert scorer.score(wide[:, :1000], [5, 6, 7, 8, 9, 10], 20) == together
    across = logits.t().contiguous().t()
    assert across.stride(1) != 1
    assert scorer.score(across, [5, 6, 7, 8, 9, 10], 20) == together


def test_nothing_asked_nothing_done() -> None:
    assert LogprobScorer(10).score(torch.empty(0, 10), [], 5) == []
