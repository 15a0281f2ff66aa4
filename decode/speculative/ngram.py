"""Prompt lookup: what followed the last time that these tokens stood here?

Saxena 2023, "Prompt lookup decoding".

Answers repeat their prompts (summaries, edits, code) and themselves. Each request has an index of
its own tokens that grows with them; a step costs the new tokens, not the history.

    tokens   . . . a b c | x y z . . . . a b c |
                         ^ end of the most recent earlier a b c: propose x y z
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

# On 24 greedy answers of the default model, drafts of 4: n from 2 gives 1.70 tokens a step with
# 51 % of the draft accepted, from 1 gives 1.88 with 35 %, from 3 gives 1.55 with 61 %. A longest n
# beyond 4 adds less than 1 %.
DEFAULT_MIN_N = 2
DEFAULT_MAX_N = 4


@dataclass(slots=True)
class _Index:
    """Where each n-gram of one request last ended, those that end at its last token left out."""

    ends: dict[int, int] = field(default_factory=dict)  # hash of the n-gram -> end, exclusive
    num_tokens: int = 0  # indexed: n-grams that end at or before it
    last: int = -1  # tokens[num_tokens - 1], to notice another history under the same id


class NgramDrafter:
    """Proposes what followed the most recent occurrence of the longest matching suffix."""

    name = "ngram"

    def __init__(self, min_n: int = DEFAULT_MIN_N, max_n: int = DEFAULT_MAX_N) -> None:
        if not 1 <= min_n <= max_n:
            raise ValueError(f"expected 1 <= min_n <= max_n, got {min_n} and {max_n}")
        self._min_n = min_n
        self._max_n = max_n
        self._indices: dict[str, _Index] = {}

    def propose(self, request_id: str, tokens: Sequence[int], max_tokens: int) -> list[int]:
        """Up to `max_tokens` tokens; a draft that outruns the history repeats its period."""
        index = self._extend(request_id, tokens)
        if max_tokens <= 0:
            return []
        end = self._find(index, tokens)
        if end is None:
            return []
        draft = list(tokens[end : end + max_tokens])
        while len(draft) < max_tokens:
            draft.append(draft[end - len(tokens)])  # negative: one period back
        return draft

    def finish(self, request_id: str) -> None:
        """Forget the request's index."""
        self._indices.pop(request_id, None)

    def _extend(self, request_id: str, tokens: Sequence[int]) -> _Index:
        """The request's index, brought up to all of `tokens` but the last."""
        index = self._indices.get(request_id)
        same = index is not None and (
            index.num_tokens == 0
            or (index.num_tokens <= len(tokens) and tokens[index.num_tokens - 1] == index.last)
        )
        if index is None or not same:
            index = self._indices[request_id] = _Index()
        stop = len(tokens) - 1  # what ends at the last token has no continuation yet
        if stop <= index.num_tokens:
            return index
        first = max(0, index.num_tokens + 1 - self._max_n)
        window = tuple(tokens[first:stop])
        for end in range(index.num_tokens + 1, stop + 1):
            for n in range(self._min_n, min(self._max_n, end) + 1):
                index.ends[hash(window[end - n - first : end - first])] = end
        index.num_tokens, index.last = stop, tokens[stop - 1]
        return index

    def _find(self, index: _Index, tokens: Sequence[int]) -> int | None:
        """End of the most recent earlier occurrence of the longest suffix that has one."""
        suffix = tuple(tokens[-self._max_n :])
        for n in range(min(self._max_n, len(suffix)), self._min_n - 1, -1):
            gram = suffix[-n:]
            end = index.ends.get(hash(gram))
            # Hashes may collide, lengths too: only equal tokens are a match.
            if end is not None and end >= n and tuple(tokens[end - n : end]) == gram:
                return end
        return None
