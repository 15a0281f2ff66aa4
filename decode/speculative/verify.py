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

from collections.abc import Sequence

from engine.scheduling.speculation import Verified


def verify(draft: Sequence[int], sampled: Sequence[int]) -> Verified:
    """Compare `draft` with `sampled`, where the i-th token was sampled after draft[:i].

    `sampled` has len(draft) + 1 tokens, or fewer if it ends with the first that differs from the
    draft: a caller may stop sampling there. Raises ValueError for any other length.
    """
    num_accepted = 0
    for draft_token, token in zip(draft, sampled, strict=False):
        if draft_token != token:
            break
        num_accepted += 1
    if not num_accepted < len(sampled) <= len(draft) + 1:
        raise ValueError(f"{len(sampled)} sampled tokens do not decide a draft of {len(draft)}")
    return Verified(num_accepted, tuple(sampled[: num_accepted + 1]))
