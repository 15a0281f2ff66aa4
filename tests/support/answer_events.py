"""Events of answers as the frontend gives them, with what a test leaves out filled in."""

from __future__ import annotations

from coordinator.generation.events import Ending, Finished, Timing, Usage
from coordinator.text.values import Logprob, ScoredToken
from engine.base.types import FinishReason

NO_TIME = Timing(0.0, 0.0, 0.0, 0.0, 0.0)


def usage(prompt: int = 0, completion: int = 0, cached: int = 0, accepted: int = 0) -> Usage:
    """Tokens of a choice."""
    return Usage(prompt, completion, cached, 0, accepted)


def finished(
    index: int = 0,
    reason: FinishReason = FinishReason.STOP,
    used: Usage | None = None,
    *,
    token: int | None = None,
    text: str | None = None,
) -> Finished:
    """The end of a choice; `token` and `text`: the stop that matched."""
    return Finished(Ending(reason, token, text), used or usage(4, 2, 1), NO_TIME, index)


def scored(
    token_id: int, text: str, value: float, *top: tuple[int, str, float], at: int = 0
) -> ScoredToken:
    """A token with its log-probability and the likeliest ones."""
    best = [Logprob(i, logprob, name) for i, name, logprob in top]
    return ScoredToken(Logprob(token_id, value, text), best, at)
