"""Log-probabilities as vLLM writes them: an object of token ids for each token."""

from __future__ import annotations

from typing import Any

from coordinator.text.values import ScoredToken

LEAST = -9999.0  # for infinities and NaN, which JSON has not


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST) if logprob == logprob else LEAST


def ranked(token: ScoredToken) -> dict[str, dict[str, Any]]:
    """The chosen token first; its rank is known where it is among the likeliest ones."""
    ranks = {each.token_id: rank for rank, each in enumerate(token.top, 1)}
    return {
        str(each.token_id): {
            "logprob": finite(each.logprob),
            "rank": ranks.get(each.token_id),
            "decoded_token": each.text,
        }
        for each in (token.chosen, *token.top)
    }
