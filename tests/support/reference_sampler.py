"""The sampler of the design, written a second time: naive, one row, in float64, from the
definitions.

It shares no line with `engine.sampling`, noise apart, so that an error has to be made twice to
hide.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.scheduling.rows import SampleRow

Doubles = NDArray[np.float64]


def scaled_logits(logits: Sequence[float] | Doubles, row: SampleRow) -> Doubles:
    """Logits [vocab] after mask, bias, penalties and, unless greedy, temperature."""
    p = row.params
    x = [float(value) for value in logits]
    history = [*row.tokens, *row.draft]
    answer = Counter(history[row.num_prompt :])
    mask = row.mask
    allowed = [mask is None or bool(mask[t // 32] >> t % 32 & 1) for t in range(len(x))]
    x = [value if ok else -math.inf for value, ok in zip(x, allowed, strict=True)]
    without = [-math.inf if token in row.banned else value for token, value in enumerate(x)]
    if mask is None or max(without) > -math.inf:
        x = without
    for token, bias in p.logit_bias:
        x[token] += bias
    for token in set(history):
        x[token] = (
            x[token] / p.repetition_penalty if x[token] > 0 else x[token] * p.repetition_penalty
        )
    for token, count in answer.items():
        x[token] -= p.frequency_penalty * count + p.presence_penalty
    return np.array(x) / (1.0 if p.greedy else p.temperature)


def softmax(x: Doubles) -> Doubles:
    """Probabilities of x [vocab]."""
    weights: Doubles = np.exp(x - x.max())
    weights /= weights.sum()
    return weights


def kept_tokens(x: Doubles, row: SampleRow) -> list[int]:
    """Ids that min-p, top-k and top-p leave of scaled logits [vocab], likeliest first."""
    p = row.params
    probabilities = softmax(x)
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    order = [t for t in order if probabilities[t] >= p.min_p * probabilities.max()]
    if p.top_k:
        order = order[: p.top_k]
    if p.top_p < 1:
        total, before, nucleus = sum(probabilities[t] for t in order), 0.0, []
        for token in order:
            if before >= p.top_p * total:
                break
            nucleus.append(token)
            before += probabilities[token]
        order = nucleus
    return order


def probabilities(logits: Sequence[float] | Doubles, row: SampleRow) -> Doubles:
    """The exact distribution [vocab] that the sampler must draw from."""
    x = scaled_logits(logits, row)
    kept = kept_tokens(x, row)
    left = np.full(len(x), -math.inf)
    left[kept] = x[kept]
    return softmax(left)
