"""Log-probabilities in the shapes of both APIs.

completions   parallel arrays: tokens, token_logprobs, top_logprobs, text_offset
chat          one object a token: token, logprob, bytes, top_logprobs
vLLM          prompt_logprobs: one object of token ids a token, null for the first
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator.text.values import Logprob, ScoredToken

LEAST = -9999.0  # for infinities and NaN, which JSON has not


def _value(logprob: float) -> float:
    return max(logprob, LEAST) if logprob == logprob else LEAST


def _name(entry: Logprob, as_id: bool) -> str:
    return f"token_id:{entry.token_id}" if as_id else entry.text


def bytes_of(token: Logprob) -> bytes:
    """The bytes of a token, which may be a part of a character."""
    return token.raw if token.raw is not None else token.text.encode()


@dataclass(slots=True)
class CompletionLogprobs:
    """Of one choice. Those of an echoed prompt come first, and its length counts in all offsets."""

    as_ids: bool
    num_echoed: int = 0  # characters of the prompt before the answer
    tokens: list[str] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    tops: list[dict[str, float] | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add_first(self, token: Logprob) -> None:
        """The first token of a prompt, which has no log-probability."""
        self._add(token, None, None, 0)

    def add(self, entries: Iterable[ScoredToken]) -> None:
        """More tokens."""
        for entry in entries:
            top: dict[str, float] = {}
            for one in (*entry.top, entry.chosen):  # of tokens with one text, the likelier
                top.setdefault(_name(one, self.as_ids), _value(one.logprob))
            self._add(entry.chosen, _value(entry.chosen.logprob), top, entry.text_offset)

    def _add(
        self, token: Logprob, value: float | None, top: dict[str, float] | None, offset: int
    ) -> None:
        self.tokens.append(_name(token, self.as_ids))
        self.values.append(value)
        self.tops.append(top)
        self.offsets.append(self.num_echoed + offset)

    def take(self) -> dict[str, Any]:
        """What was added since the last call."""
        taken = {
            "tokens": self.tokens,
            "token_logprobs": self.values,
            "top_logprobs": self.tops,
            "text_offset": self.offsets,
        }
        self.tokens, self.values, self.tops, self.offsets = [], [], [], []
        return taken


def chat_logprobs(entries: Iterable[ScoredToken], as_ids: bool) -> list[dict[str, Any]]:
    """The `content` of a chat choice's logprobs."""
    return [
        {**_token(e.chosen, as_ids), "top_logprobs": [_token(one, as_ids) for one in e.top]}
        for e in entries
    ]


def _token(entry: Logprob, as_ids: bool) -> dict[str, Any]:
    return {
        "token": _name(entry, as_ids),
        "logprob": _value(entry.logprob),
        "bytes": list(bytes_of(entry)),
    }


def prompt_logprobs(entries: Sequence[ScoredToken]) -> list[dict[str, Any] | None]:
    """vLLM's prompt_logprobs; only the likeliest tokens have a rank."""
    out: list[dict[str, Any] | None] = [None]
    for entry in entries:
        ranks = {one.token_id: rank for rank, one in enumerate(entry.top, start=1)}
        out.append(
            {
                str(one.token_id): {
                    "logprob": _value(one.logprob),
                    "rank": ranks.get(one.token_id),
                    "decoded_token": one.text,
                }
                for one in (entry.chosen, *entry.top)
            }
        )
    return out
