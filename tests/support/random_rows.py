"""Random rows to sample: every parameter now and then, in every company."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from engine.base.types import SamplingParams
from engine.sampling import SampleRow

VOCAB = 331  # odd: rows of a batch start at any alignment


def random_params(rng: random.Random, vocab_size: int = VOCAB) -> SamplingParams:
    """A random mix of everything, greedy half of the time."""

    def maybe(value: float, default: float) -> float:
        return value if rng.random() < 0.5 else default

    return SamplingParams(
        temperature=maybe(rng.choice([0.2, 0.7, 1.0, 2.5]), 0.0),
        top_p=maybe(rng.uniform(0.05, 0.999), 1.0),
        top_k=int(maybe(rng.randrange(1, vocab_size + 70), 0)),
        min_p=maybe(rng.uniform(0.001, 0.3), 0.0),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0),
        repetition_penalty=maybe(rng.uniform(0.7, 1.8), 1.0),
        seed=rng.getrandbits(64),
        logit_bias=tuple((t, rng.uniform(-9, 9)) for t in rng.sample(range(vocab_size), 3))
        if rng.random() < 0.3
        else (),
    )


def random_mask(rng: random.Random, vocab_size: int = VOCAB) -> NDArray[np.int32]:
    """What a grammar may allow: a few tokens, many or all, token 0 among them."""
    share = rng.choice([0.0, 0.01, 0.5, 1.0])
    return mask_of([0, *(t for t in range(1, vocab_size) if rng.random() < share)], vocab_size)


def mask_of(allowed: Iterable[int], vocab_size: int = VOCAB) -> NDArray[np.int32]:
    """A bit a token, 32 to a word, the lowest first."""
    words = np.zeros(-(-vocab_size // 32), np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words.view(np.int32)


def random_row(rng: random.Random) -> SampleRow:
    """Random parameters over a random history, draft and ban."""
    tokens = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 60))]
    guesses = [rng.randrange(VOCAB) for _ in range(rng.randrange(5))]
    return SampleRow(
        random_params(rng),
        len(tokens) + len(guesses),
        tokens,
        rng.randrange(1, len(tokens) + 1),
        guesses,
        frozenset(rng.sample(range(1, VOCAB), 2)) if rng.random() < 0.3 else frozenset(),
        random_mask(rng) if rng.random() < 0.2 else None,
    )


def random_batch(seed: int, size: int) -> tuple[torch.Tensor, list[SampleRow]]:
    """Logits float32 [size, VOCAB] and their rows."""
    rng = random.Random(seed)
    logits = torch.randn(size, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    return logits, [random_row(rng) for _ in range(size)]
