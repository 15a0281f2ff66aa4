"""The sampler as a function: order of its steps, ties, errors, and indifference to the batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from engine.base.types import SamplingParams
from engine.sampling import Sampler, SampleRow, UnusableLogits
from engine.sampling.filters import filter_logits
from engine.sampling.philox import gumbel_row
from engine.sampling.sampler import argmax_torch
from tests.support.near_tie import possible_tokens
from tests.support.random_rows import VOCAB, random_batch

Make = Callable[[int], Sampler]


@pytest.fixture(params=[True, False], ids=["native", "torch"])
def make(request: pytest.FixtureRequest) -> Make:
    """A sampler for a vocabulary; of both ways, where there are two."""
    return partial(Sampler, native=request.param)


def test_a_row_is_the_same_alone_and_in_any_batch(make: Make) -> None:
    sampler = make(VOCAB)
    logits, rows = random_batch(0, 120)
    together = sampler.sample(logits, rows)
    assert together == [sampler.sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    order = random.Random(1).sample(range(120), 120)
    assert sampler.sample(logits[order], [rows[i] for i in order]) == [together[i] for i in order]


def test_equals_the_second_implementation(make: Make) -> None:
    """In float64, from the definitions; where rounding decides, any token it allows."""
    logits, rows = random_batch(2, 600)
    num_ties = 0
    for i, token in enumerate(make(VOCAB).sample(logits, rows)):
        exact = possible_tokens(logits[i], rows[i], bound=1e-12)
        assert token in possible_tokens(logits[i], rows[i], bound=1e-5)
        num_ties += exact != {token}
    assert num_ties <= 1


def test_logits_are_left_alone(make: Make) -> None:
    logits, rows = random_batch(3, 40)
    before = logits.clone()
    make(VOCAB).sample(logits, rows)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bias", [(), ((3, -100.0),)])
def test_greedy_ties_go_to_the_lowest_id(make: Make, bias: tuple[tuple[int, float], ...]) -> None:
    logits = torch.zeros(3, VOCAB)
    logits[0, [330, 17, 90]] = 2.0
    logits[2, 1] = -0.0
    rows = [SampleRow(SamplingParams(logit_bias=bias), 1, [0], 1)] * 3
    assert make(VOCAB).sample(logits, rows) == [17, 0, 0]
    assert argmax_torch(logits) == [17, 0, 0]


@pytest.mark.parametrize("spread", [0.1, 5.0, 60.0])
def test_tokens_without_a_chance_are_skipped_without_a_trace(make: Make, spread: float) -> None:
    """A large vocabulary takes other ways to the noise: a whole row's, or the candidates' alone."""
    vocab_size, size = 6001, 30
    logits = torch.randn(size, vocab_size, generator=torch.Generator().manual_seed(8)) * spread
    rows = [
        SampleRow(
            SamplingParams(temperature=1.0, seed=i, min_p=0.01 * (i % 2), top_k=50 * (i % 3)),
            i,
            [0],
            1,
        )
        for i in range(size)
    ]
    filtered = logits.clone()
    filter_logits(filtered, rows)
    noise = torch.from_numpy(np.stack([gumbel_row(i, i, vocab_size) for i in range(size)]))
    assert make(vocab_size).sample(logits, rows) == (filtered + noise).argmax(1).tolist()


def test_a_temperature_below_1e_5_is_greedy(make: Make) -> None:
    logits, _ = random_batch(4, 50)
    rows = [
        SampleRow(SamplingParams(temperature=t, seed=i), 1, [0], 1)
        for i, t in enumerate([0.0, 9e-6] * 25)
    ]
    assert make(VOCAB).sample(logits, rows) == logits.argmax(1).tolist()


def test_position_and_seed_alone_move_a_sampled_token(make: Make) -> None:
    sampler, logits = make(VOCAB), torch.zeros(1, VOCAB)

    def token(seed: int, position: int) -> int:
        row = SampleRow(SamplingParams(temperature=1.0, seed=seed), position, [0], 1)
        return sampler.sample(logits, [row])[0]

    assert token(1, 5) == token(1, 5)
    assert len({token(1, position) for position in range(20)}) > 10
    assert len({token(seed, 5) for seed in range(20)}) > 10


def test_banned_tokens_never_come(make: Make) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 50.0
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, logit_bias=((7, 100.0),))
        row = SampleRow(params, 3, [1], 1, (), frozenset({7}))
        assert make(VOCAB).sample(logits, [row]) != [7]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_unusable_logits_name_their_rows(make: Make, value: float) -> None:
    logits, rows = random_batch(5, 4)
    logits[1, 5] = logits[3, 0] = value
    with pytest.raises(UnusableLogits, match="row 1, 3") as error:
        make(VOCAB).sample(logits, rows)
    assert error.value.rows == (1, 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_left_names_its_row(make: Make, temperature: float) -> None:
    logits = torch.zeros(3, 4)
    logits[2, 1:] = float("-inf")
    rows = [SampleRow(SamplingParams(temperature=temperature), 1, [0], 1)] * 2
    rows.append(SampleRow(SamplingParams(temperature=temperature), 1, [0], 1, (), frozenset({0})))
    with pytest.raises(UnusableLogits, match="no token is left") as error:
        make(4).sample(logits, rows)
    assert error.value.rows == (2,)
    assert make(4).sample(logits[:2], rows[:2])
    with pytest.raises(UnusableLogits):
        make(4).sample(torch.full((1, 4), float("-inf")), rows[:1])


def test_shapes_are_checked(make: Make) -> None:
    _, rows = random_batch(6, 2)
    for wrong in (torch.zeros(3, VOCAB), torch.zeros(2, VOCAB + 1), torch.zeros(2, VOCAB).double()):
        with pytest.raises(ValueError, match="float32"):
            make(VOCAB).sample(wrong, rows)
    assert make(VOCAB).sample(torch.zeros(0, VOCAB), []) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_draws_the_cpu_s_tokens() -> None:
    logits, rows = random_batch(7, 300)
    on_cuda = Sampler(VOCAB, "cuda").sample(logits.cuda(), rows)
    for i, token in enumerate(Sampler(VOCAB).sample(logits, rows)):
        assert on_cuda[i] == token or on_cuda[i] in possible_tokens(logits[i], rows[i], 1e-5)
