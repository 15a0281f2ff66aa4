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

from engine.scheduling.speculation import FORCED, PENDING, Draft

BUCKET_RATE = 0.1
REQUEST_RATE = 0.1
_LIMIT = 6.0  # logits; 0.25 % and 99.75 %


class Acceptance:
    """Owned by one draft length controller."""

    def __init__(self, prior: Sequence[float]) -> None:
        self._buckets = [math.log(p / (1 - p)) for p in prior]
        self._odds = [math.exp(x) for x in self._buckets]  # the same, as it is used most
        self._requests: dict[str, float] = {}

    def survival(self, request_id: str, buckets: Sequence[int], least: float) -> list[float]:
        """Probability that the first token is accepted, the first two, ...; ends below `least`."""
        factor, odds = math.exp(self._requests.get(request_id, 0.0)), self._odds
        out, survival = [], 1.0
        for bucket in buckets:
            if bucket != FORCED:
                x = odds[bucket] * factor
                survival *= x / (1.0 + x)
            if survival < least:
                break
            out.append(survival)
        return out

    def learn(self, request_id: str, draft: Draft, produced: Sequence[int]) -> None:
        """`produced` followed where `draft` was proposed; PENDING tokens teach nothing."""
        of_request = self._requests.get(request_id, 0.0)
        for draft_token, bucket, token in zip(draft.tokens, draft.buckets, produced, strict=False):
            if draft_token == PENDING:
                break
            if bucket == FORCED:  # a forced token is not the drafter's
                if draft_token != token:
                    break
                continue
            logit = self._buckets[bucket]
            surprise = (draft_token == token) - 1.0 / (1.0 + math.exp(-logit - of_request))
            of_request = _clip(of_request + REQUEST_RATE * surprise)
            self._buckets[bucket] = logit = _clip(logit + BUCKET_RATE * surprise)
            self._odds[bucket] = math.exp(logit)
            if draft_token != token:
                break
        self._requests[request_id] = of_request

    def finish(self, request_id: str) -> None:
        """Forget the request; what it taught about buckets stays."""
        self._requests.pop(request_id, None)


def _clip(logit: float) -> float:
    return min(max(logit, -_LIMIT), _LIMIT)
