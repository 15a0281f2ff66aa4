"""The acceptance probability of a draft token, by its confidence bucket and by its request.

One number a bucket, learned from all requests, and one a request, for the difference of its drafts
from those of others. In logits, as online logistic regression:

    P(accepted) = 1 / (1 + exp(-(bucket + request)))

Both move after every decided token by a fixed share of the surprise, so that old observations fade
without a clock. A draft need not be verified for that: the tokens of the answer show which of its
tokens would have been accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from decode.speculative.native import native_function
from engine.scheduling.speculation import FORCED, PENDING, Drafts, Ints, Tokens, grown

BUCKET_RATE = 0.1
REQUEST_RATE = 0.1
_LIMIT = 6.0  # logits; 0.25 % and 99.75 %


class Acceptance:
    """Owned by one draft length controller."""

    def __init__(self, prior: Sequence[float], *, native: bool = True) -> None:
        """`native`: learn in C, where there are kernels for this CPU."""
        self._buckets = np.array([math.log(p / (1 - p)) for p in prior])  # logits
        self._requests = np.zeros(16)  # the same of each draft id
        name = "diptych_acceptance_learn"
        self._native = native_function(name, "ppippqppqpppddd") if native else None

    def survival(self, ids: Ints, drafts: Drafts, least: float) -> NDArray[np.float64]:
        """Probability that the first token is accepted, the first two, ... of each draft.

        [R, width]; 0 beyond a draft's length, and where it is below `least`.
        """
        self._requests = grown(self._requests, int(ids.max(initial=-1)) + 1)
        odds_against = np.append(np.exp(-self._buckets), 0.0)  # the last: FORCED
        against = odds_against[drafts.buckets] * np.exp(-self._requests[ids])[:, None]
        out: NDArray[np.float64] = np.multiply.accumulate(1.0 / (1.0 + against), axis=1)
        out[(out < least) | (np.arange(out.shape[1]) >= drafts.lengths[:, None])] = 0.0
        return out

    def learn(self, ids: Ints, drafts: Drafts, rows: Ints, produced: Tokens, counts: Ints) -> None:
        """The first counts[r] of produced [R, width] followed where the draft rows[r] was proposed.

        PENDING tokens teach nothing.
        """
        self._requests = grown(self._requests, int(ids.max(initial=-1)) + 1)
        if self._native is None:
            self._learn(ids, drafts, rows, produced, counts)
            return
        self._native(
            *(ids, rows, len(ids), drafts.tokens, drafts.buckets, drafts.tokens.shape[1]),
            *(drafts.lengths, np.ascontiguousarray(produced), produced.shape[1], counts),
            *(self._buckets, self._requests, BUCKET_RATE, REQUEST_RATE, _LIMIT),
        )

    def _learn(self, ids: Ints, drafts: Drafts, rows: Ints, produced: Tokens, counts: Ints) -> None:
        """The same without kernels, bit for bit."""
        for i, (draft_id, row) in enumerate(zip(ids.tolist(), rows.tolist(), strict=True)):
            draft, of_request = drafts[row], float(self._requests[draft_id])
            came = produced[i, : counts[i]].tolist()
            for draft_token, bucket, token in zip(draft.tokens, draft.buckets, came, strict=False):
                if draft_token == PENDING:
                    break
                if bucket != FORCED:  # a forced token is not the drafter's
                    logit = float(self._buckets[bucket])
                    surprise = (draft_token == token) - 1.0 / (1.0 + math.exp(-logit - of_request))
                    of_request = _clip(of_request + REQUEST_RATE * surprise)
                    self._buckets[bucket] = _clip(logit + BUCKET_RATE * surprise)
                if draft_token != token:
                    break
            self._requests[draft_id] = of_request

    def finish(self, draft_id: int) -> None:
        """Forget the request; what it taught about buckets stays."""
        self._requests[draft_id : draft_id + 1] = 0.0


def _clip(logit: float) -> float:
    return min(max(logit, -_LIMIT), _LIMIT)
