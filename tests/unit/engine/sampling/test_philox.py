"""Philox against the published vectors; the noise against Gumbel's distribution and its own
purity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from engine.sampling import philox
from engine.sampling.philox import gumbel, gumbel_at, gumbel_row, philox4x32

# Random123's kat_vectors for philox4x32-10: counter, key, output.
ONES = "ffffffff ffffffff"
VECTORS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    (f"{ONES} {ONES}", ONES, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def _hex(words: str) -> list[int]:
    return [int(word, 16) for word in words.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
@pytest.mark.parametrize("make", [lambda w: np.array([w], np.int64), lambda w: torch.tensor([w])])
def test_known_answers(make, counter: str, key: str, expected: str) -> None:
    c = tuple(make(word) for word in _hex(counter))
    for k in (tuple(_hex(key)), tuple(make(word) for word in _hex(key))):
        assert [int(word[0]) for word in philox4x32(c, k)] == _hex(expected)


CASES = [(0, 0), (1, 1), (2**64 - 1, 7), (2**63, 2**32 + 5), (0x0123456789ABCDEF, 8191)]


def test_noise_is_one_function_of_seed_position_token() -> None:
    """However it is asked for: a row, a batch, single tokens, by numpy or by torch."""
    vocab_size = 1003
    seeds, positions = [s for s, _ in CASES], [p for _, p in CASES]
    batch = np.stack([gumbel_row(seed, position, vocab_size) for seed, position in CASES])
    for i, (seed, position) in enumerate(CASES):
        assert np.array_equal(batch[i, :10], gumbel_row(seed, position, 10))
    rng = np.random.default_rng(0)
    rows, tokens = rng.integers(0, len(CASES), 777), rng.integers(0, vocab_size, 777)
    assert np.array_equal(gumbel_at(seeds, positions, rows, tokens), batch[rows, tokens])
    by_torch = gumbel(seeds, positions, vocab_size, "cpu").numpy()
    # The bits are equal; two libraries' logarithms may round the last one of a float differently.
    np.testing.assert_allclose(by_torch, batch, rtol=3e-7, atol=3e-7)
    assert (by_torch == batch).mean() > 0.999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_noise_on_cuda_is_the_cpu_s() -> None:
    seeds, positions = [s for s, _ in CASES], [p for _, p in CASES]
    on_cuda = gumbel(seeds, positions, 1003, "cuda").cpu().numpy()
    on_cpu = np.stack([gumbel_row(seed, position, 1003) for seed, position in CASES])
    np.testing.assert_allclose(on_cuda, on_cpu, rtol=3e-7, atol=3e-7)


def test_every_argument_matters() -> None:
    rows = [gumbel_row(s, p, 64) for s in (5, 6, 5 + 2**32) for p in (9, 10, 9 + 2**32)]
    assert len({value for row in rows for value in row.tolist()}) == len(rows) * 64


def test_extreme_words_stay_finite() -> None:
    words = np.array([0, 2**32 - 1], np.int64)
    low, high = philox._noise(words, words)
    assert philox.MIN_GUMBEL < low < -3.60
    assert 36.73 < high < philox.MAX_GUMBEL


def test_noise_is_gumbel_distributed_into_the_tail() -> None:
    noise = np.concatenate([gumbel_row(seed, seed * 31, 50_000) for seed in range(20)])
    assert stats.kstest(noise, "gumbel_r").pvalue > 1e-3
    assert stats.kstest(noise + 0.01, "gumbel_r").pvalue < 1e-6
    # 32 bits alone would have 23 as their largest value, 24 bits 17.
    assert np.count_nonzero(noise > 10) == pytest.approx(1e6 * -np.expm1(-np.exp(-10)), abs=25)
    assert len(np.unique(noise[noise > 8])) == np.count_nonzero(noise > 8)


def test_neighbours_are_independent() -> None:
    """Adjacent tokens (one counter's words), adjacent positions, adjacent seeds: no rank
    correlation."""
    base = np.stack([gumbel_row(3, position, 4000) for position in range(100)])
    pairs = {
        "tokens": (base[:, :-1], base[:, 1:]),
        "words 0 and 1": (base[:, 0::4], base[:, 1::4]),
        "words 3 and 0": (base[:, 3::4], base[:, 0::4]),
        "positions": (base[:-1], base[1:]),
        "seeds": (base[:50], np.stack([gumbel_row(4, position, 4000) for position in range(50)])),
    }
    for name, (a, b) in pairs.items():
        correlation = stats.spearmanr(a.ravel(), b.ravel()).statistic
        assert abs(correlation) < 4.5 / np.sqrt(a.size), name
