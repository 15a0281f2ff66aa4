"""The accepted tokens of a draft, given the sampler's token after each prefix of it.

Rejection sampling (Leviathan, Kalman, Matias 2023, "Fast inference from transformers via
speculative decoding"; Chen et al. 2023, "Accelerating large language model decoding with
speculative sampling") accepts a draft token x with min(1, p(x) / q(x)) and samples a rejected one
from the residual max(0, p - q), so that what comes out has the target's *distribution*. Here the
sampler is a deterministic function of (logits, history, seed, position), so the rule can be
stricter and simpler: x is accepted if and only if the sampler, given the same history, produces x.

Then what comes out is the same *tokens* as without drafts, by induction over the positions: the row
at i had as its history exactly the accepted tokens before i, or it is not used. And nothing is
lost: for a deterministic draft (q = 1 at x) both rules accept with probability p(x), and the
sampler's token, given that it is not x, has the residual's distribution.

    draft      d0   d1   d2   d3
    sampled    d0   d1    s    .    .         row i: the token after the request's tokens + d[:i]
               accepted   recovered           all four accepted: the fifth row is the bonus
"""

from __future__ import annotations

import numpy as np

from engine.scheduling.speculation import Ints, Tokens


def verify(drafts: Tokens, sampled: Tokens) -> Ints:
    """How many tokens of each draft are accepted, int64 [R]; the next sampled one follows them.

    `drafts` [R, width] are padded with negative numbers, which no sampled token equals. The i-th of
    `sampled` [R, width + 1] was sampled after draft[:i]. Raises ValueError for other shapes.
    """
    num_rows, width = drafts.shape
    if sampled.shape != (num_rows, width + 1):
        raise ValueError(
            f"sampled tokens {list(sampled.shape)} do not decide drafts {[num_rows, width]}"
        )
    stands = np.logical_and.accumulate(drafts == sampled[:, :-1], axis=1)
    num_accepted: Ints = stands.sum(axis=1, dtype=np.int64)
    return num_accepted
