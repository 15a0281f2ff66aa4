"""That the sampler samples: over a million draws against the exact filtered softmax, by chi-square.

Seeds are fixed, so each p-value is a constant: a failure is a change of the sampler, never bad
luck. With 30 p-values the smallest is expected at 1/30; the limit of 1e-4 stands far below and far
above a bias's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from scipy import stats

from engine.base.seeds import choice_seed, default_seed
from engine.base.types import SamplingParams
from engine.sampling import Sampler, SampleRow
from tests.support.reference_sampler import probabilities

VOCAB = 24
BATCH = 10_000
LEAST_P = 1e-4
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(11)) * 1.5
TOKENS = [0, 3, 5, 7, 7, 1, 3, 3, 9]
NUM_PROMPT = 5
BANNED = frozenset({6})

# How (seed, position) change from one draw to the next.
WALKS: dict[str, Callable[[int], tuple[int, int]]] = {
    "positions": lambda i: (0xDEADBEEF12345678, i),
    "seeds": lambda i: (i, 17),
    "request ids": lambda i: (default_seed(f"request-{i}"), 17),
    "choices": lambda i: (choice_seed(99, i), 17),
    "both": lambda i: (i // 100, i % 100),
}
FILTERS: dict[str, dict[str, object]] = {
    "temperature 1": {"temperature": 1.0},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 3": {"temperature": 3.0},
    "top-k": {"temperature": 1.2, "top_k": 7},
    "top-p": {"temperature": 1.0, "top_p": 0.8},
    "min-p": {"temperature": 1.5, "min_p": 0.1},
    "penalties": {
        "temperature": 1.0,
        "repetition_penalty": 1.4,
        "frequency_penalty": 0.6,
        "presence_penalty": -0.4,
    },
    "bias": {"temperature": 1.0, "logit_bias": ((2, 2.0), (8, -3.0))},
    "all": {
        "temperature": 1.3,
        "top_k": 18,
        "top_p": 0.93,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "logit_bias": ((4, 1.0),),
    },
}
# 5 x 130,000 + 9 x 45,000 = 1,055,000 draws.
CASES = [(walk, "temperature 1", 130_000) for walk in WALKS]
CASES += [("both", name, 45_000) for name in FILTERS]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small operations: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _row(seed: int, position: int, **params: object) -> SampleRow:
    resolved = SamplingParams(seed=seed, **params)  # type: ignore[arg-type]
    return SampleRow(resolved, position, TOKENS, NUM_PROMPT, (), BANNED)


def _draws(
    walk: Callable[[int], tuple[int, int]], size: int, native: bool = True, **params: object
) -> np.ndarray:
    """`size` tokens, int64 [size]."""
    sampler, tokens = Sampler(VOCAB, native=native), []
    for start in range(0, size, BATCH):
        rows = [_row(*walk(i), **params) for i in range(start, min(start + BATCH, size))]
        tokens += sampler.sample(LOGITS.expand(len(rows), -1), rows)
    return np.array(tokens)


def chi_square_p(tokens: Sequence[int] | np.ndarray, expected: np.ndarray) -> float:
    """p-value of `tokens` under `expected` probabilities [vocab]; 0 if an impossible one occurs."""
    counts = np.bincount(tokens, minlength=len(expected))
    possible = expected > 0
    if counts[~possible].any():
        return 0.0
    observed, wanted = counts[possible], expected[possible] * len(tokens)
    rare = wanted < 5  # the test's approximation needs about five of each
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        wanted = np.append(wanted[~rare], wanted[rare].sum())
    return float(stats.chisquare(observed, wanted, sum_check=False).pvalue)


def test_a_million_draws() -> None:
    assert sum(size for _, _, size in CASES) >= 1_000_000


@pytest.mark.parametrize("native", [True, False], ids=["native", "torch"])
@pytest.mark.parametrize(("walk", "name", "size"), CASES)
def test_draws_follow_the_filtered_softmax(walk: str, name: str, size: int, native: bool) -> None:
    params = FILTERS[name]
    expected = probabilities(LOGITS.tolist(), _row(0, 0, **params))
    assert chi_square_p(_draws(WALKS[walk], size, native, **params), expected) > LEAST_P


def test_neighbouring_draws_are_independent() -> None:
    """Pairs of draws one position, one seed and one choice apart follow the product."""
    expected = probabilities(LOGITS.tolist(), _row(0, 0, temperature=1.0))
    product = np.outer(expected, expected).ravel()
    for walk in ("positions", "seeds", "choices"):
        tokens = _draws(WALKS[walk], 60_000, temperature=1.0)
        assert chi_square_p(tokens[0::2] * VOCAB + tokens[1::2], product) > LEAST_P, walk


def test_a_bias_would_be_seen() -> None:
    """The same test refuses samplers that are wrong by little."""
    row = _row(0, 0, temperature=1.0)
    expected = probabilities(LOGITS.tolist(), row)
    tokens = _draws(WALKS["both"], 130_000, temperature=1.0)
    wrong_temperature = probabilities(LOGITS.tolist(), _row(0, 0, temperature=1.05))
    assert chi_square_p(tokens, wrong_temperature) < 1e-6
    without_bias = probabilities(LOGITS.tolist(), _row(0, 0, **FILTERS["bias"]))
    assert chi_square_p(tokens, without_bias) < 1e-6
    # One draw in a hundred replaced by the likeliest token.
    biased = np.where(np.arange(len(tokens)) % 100 == 0, expected.argmax(), tokens)
    assert chi_square_p(biased, expected) < 1e-6
    assert chi_square_p(np.append(tokens, 6), expected) == 0  # token 6 is banned
    # And draws that repeat their neighbour are refused as pairs.
    product = np.outer(expected, expected).ravel()
    sticky = np.where(np.arange(60_000) % 50 == 1, np.roll(tokens[:60_000], 1), tokens[:60_000])
    assert chi_square_p(sticky[0::2] * VOCAB + sticky[1::2], product) < 1e-6
