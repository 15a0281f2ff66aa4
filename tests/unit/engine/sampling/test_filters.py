"""min-p, top-k and top-p against their definitions, ties, wide nuclei and batches included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base.types import SamplingParams
from engine.sampling.filters import edit_logits, filter_logits, keep_top
from engine.scheduling.rows import SampleRow
from tests.support.reference_sampler import kept_tokens, scaled_logits


def _filtered(logits: torch.Tensor, rows: list[SampleRow]) -> list[list[int]]:
    x = logits.clone()
    filter_logits(x, rows)
    return [torch.isfinite(row).nonzero().flatten().tolist() for row in x]


def _row(**params: float) -> SampleRow:
    return SampleRow(SamplingParams(**{"temperature": 1.0, **params}), 0, [], 0)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 5, 39, 40, 41]),
    top_p=st.sampled_from([1.0, 0.999, 0.913, 0.47, 0.101, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0101, 0.23, 1.0]),
)


@settings(max_examples=150)
@given(st.lists(PARAMS, min_size=1, max_size=5), st.integers(0, 2**32 - 1), st.booleans())
def test_keeps_what_the_definition_keeps(
    params: list[SamplingParams], seed: int, ties: bool
) -> None:
    logits = torch.randn(len(params), 40, generator=torch.Generator().manual_seed(seed)) * 3
    if ties:
        logits = logits.round()
    rows = [SampleRow(p, 0, [], 0) for p in params]
    expected = [
        sorted(kept_tokens(scaled_logits(x.numpy(), row), row))
        for x, row in zip(logits, rows, strict=True)
    ]
    assert _filtered(logits, rows) == expected


def test_top_p_keeps_the_token_that_crosses() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert _filtered(logits, [_row(top_p=0.49)]) == [[0]]
    assert _filtered(logits, [_row(top_p=0.51)]) == [[0, 1]]
    assert _filtered(logits, [_row(top_p=0.81)]) == [[0, 1, 2]]


def test_top_p_is_of_what_top_k_left() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    # 0.4 / 0.7 = 0.571 of the first two.
    assert _filtered(logits, [_row(top_p=0.56, top_k=2)]) == [[0]]
    assert _filtered(logits, [_row(top_p=0.56)]) == [[0, 1]]


def test_equal_logits_stay_by_lowest_id() -> None:
    logits = torch.zeros(2, 8)
    logits[1, 6] = 1
    logits[1, 0] = -0.0
    assert _filtered(logits, [_row(top_k=3)] * 2) == [[0, 1, 2], [0, 1, 6]]
    assert _filtered(logits, [_row(top_p=0.3), _row()])[0] == [0, 1, 2]


@pytest.mark.parametrize("temperature", [0.4, 1.0, 5.0, 100.0])
@pytest.mark.parametrize("top_p", [0.5, 0.95, 0.9999])
def test_nuclei_of_every_width(temperature: float, top_p: float) -> None:
    """Narrow ones end in the first look, flat ones in the second or third; all are the
    definition's."""
    logits = torch.randn(1, 6000, generator=torch.Generator().manual_seed(1)) * 3
    row = _row(temperature=temperature, top_p=top_p)
    expected = kept_tokens(scaled_logits(logits[0].numpy(), row), row)
    got = _filtered(logits, [row])[0]
    # fp32 against float64: at a flat distribution the cut may move by a token or two.
    assert abs(len(got) - len(expected)) <= 2
    assert len(set(got) ^ set(expected)) <= 2
    # Beside rows that make it look elsewhere it keeps the same.
    others = [_row(top_k=5000), row, _row(top_p=0.01), _row(top_k=300, top_p=0.9)]
    assert _filtered(logits.repeat(4, 1), others)[1] == got


def test_removed_tokens_stay_removed() -> None:
    x = torch.full((1, 5), float("-inf"))
    x[0, 3] = 1.0
    keep_top(x, [4], [0.9])
    assert torch.isfinite(x).nonzero().tolist() == [[0, 3]]


def test_penalties_by_hand() -> None:
    params = SamplingParams(
        repetition_penalty=2.0,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias=((4, 3.0), (5, -1.0)),
    )
    tokens = [0, 1, 2, 2]  # prompt 0 1, answer 2 2
    rows = [
        SampleRow(params, 4, tokens, 2, (), frozenset({6})),
        SampleRow(params, 6, tokens, 2, (3, 2)),
        SampleRow(SamplingParams(), 4, tokens, 2),
    ]
    x = torch.tensor([[4.0, -4.0, 2.0, 1.0, 0.0, 0.0, 9.0]]).repeat(3, 1)
    edit_logits(x, rows)
    assert x[0].tolist() == [2.0, -8.0, 1.0 - 1.0 - 0.25, 1.0, 3.0, -1.0, float("-inf")]
    assert x[1].tolist() == [2.0, -8.0, 1.0 - 1.5 - 0.25, 0.5 - 0.5 - 0.25, 3.0, -1.0, 9.0]
    assert x[2].tolist() == [4.0, -4.0, 2.0, 1.0, 0.0, 0.0, 9.0]


def test_bias_comes_before_repetition() -> None:
    x = torch.tensor([[-1.0, 0.0]])
    params = SamplingParams(repetition_penalty=2.0, logit_bias=((0, 3.0),))
    edit_logits(x, [SampleRow(params, 1, [0], 1)])
    assert np.allclose(x.numpy(), [[1.0, 0.0]])
