"""Prompt lookup: the draft is what followed the last occurrence of the same tokens.

Saxena 2023, "Prompt lookup decoding".

Answers repeat their prompts (summaries, edits, code) and themselves. Each request has an index of
its own tokens that grows with them; a step costs the new tokens and the draft, not the history.

    tokens   . . . d b c | . . . a b c | x y z . . . . a b c |
                                 ^^^^^   end of the most recent of the longest matches: x y z

As in LZ77's hash chains, every pair of tokens links to the pair's previous end, and a search walks
one chain. The chain of single tokens serves where no pair occurred before. docs/decisions.md has
what this was chosen against. kernels/speculation.c is the same in C, for all rows of a step.

A draft token's confidence bucket is given by its support: how many tokens match before it, draft
tokens included (a bucket counts only if they are accepted), and whether the two most recent of the
longest matches agree. That predicts acceptance far better than a request's past hits do.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from decode.speculative.native import native_lookup
from engine.scheduling.plan import PlannedRow
from engine.scheduling.speculation import (
    Draft,
    DraftInputs,
    Drafts,
    Ints,
    StepResult,
    Tokens,
    grown,
)

MAX_MATCH = 32  # a longer match is no better founded
# Occurrences looked at, most recent first. On 8,000 tokens of text, a passage given a second time
# is found at 98.5 % of its tokens with 32, at 99.8 % with 64.
MAX_WALK = 64
MAX_DRAFT = 256

# A token's bucket is the length of the match before it, and the next most recent of the longest
# matches: it is missing (or was left behind), differs, or agrees. The share of
# accepted tokens of each bucket, on 72 answers of the default model at temperatures 0, 0.7 and 1;
# an engine starts from there.
_LENGTHS = (1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 32)
_ALONE = (0.25, 0.49, 0.59, 0.68, 0.73, 0.80, 0.82, 0.87, 0.93, 0.96, 0.975)
_DIFFER = (0.13, 0.23, 0.28, 0.31, 0.36, 0.36, 0.36, 0.40, 0.40, 0.45, 0.50)
_AGREE = (0.52, 0.78, 0.86, 0.90, 0.92, 0.94, 0.96, 0.975, 0.98, 0.985, 0.995)


def _buckets(kind: int) -> list[int]:
    """Buckets of a token after 0, 1, 2, ... matching tokens."""
    counts = [sum(length <= n for length in _LENGTHS) for n in range(MAX_MATCH + MAX_DRAFT)]
    return [kind * len(_LENGTHS) + max(0, count - 1) for count in counts]


_BUCKET_ALONE, _BUCKET_DIFFER, _BUCKET_AGREE = _buckets(0), _buckets(1), _buckets(2)


class NgramDrafter:
    """Proposes what followed the most recent of the longest matches of the last tokens."""

    name = "ngram"
    has_kv = False
    acceptance = (*_ALONE, *_DIFFER, *_AGREE)

    def __init__(self, *, native: bool = True) -> None:
        """`native`: in C, where there are kernels for this CPU."""
        buckets = np.array([_BUCKET_ALONE, _BUCKET_DIFFER, _BUCKET_AGREE], np.int32)
        lookup = native_lookup(buckets) if native else None
        self._lookup = PythonLookup() if lookup is None else lookup
        self._sizes = np.zeros(16, np.int64)  # tokens of each index

    def propose(self, inputs: DraftInputs) -> Drafts:
        """See Drafter; a draft that outruns the history repeats its period."""
        ids = inputs.ids
        self._sizes = grown(self._sizes, int(ids.max(initial=-1)) + 1)
        for i in np.flatnonzero(self._sizes[ids] != inputs.lengths).tolist():
            self._catch_up(ids[i : i + 1], inputs.histories[i])
        return self._lookup.propose(ids, np.minimum(inputs.limits, MAX_DRAFT))

    def materialize(self, rows: Sequence[PlannedRow]) -> list[PlannedRow]:
        """The rows as they are: its drafts cost nothing and are whole."""
        return list(rows)

    def observe(self, output: StepResult, rows: Sequence[PlannedRow]) -> Mapping[int, int]:
        """Nothing: it has no KV."""
        return {}

    def produced(self, ids: Ints, tokens: Tokens, counts: Ints) -> None:
        """Append the tokens to the indices that exist."""
        self._sizes = grown(self._sizes, int(ids.max(initial=-1)) + 1)
        counts = np.where(self._sizes[ids] > 0, counts, 0)
        self._lookup.append(ids, tokens, counts)
        self._sizes[ids] += counts

    def finish(self, draft_id: int) -> None:
        """Forget the request's index."""
        self._lookup.drop(draft_id)
        self._sizes[draft_id : draft_id + 1] = 0

    def _catch_up(self, ids: Ints, history: list[int]) -> None:
        """Append what an index lacks of the history: all of it for a new request."""
        size = int(self._sizes[ids[0]])
        if size > len(history):  # of another request
            self.finish(int(ids[0]))
            size = 0
        missing = np.array([history[size:]], np.int64).astype(np.int32)
        self._lookup.append(ids, missing, np.array([missing.shape[1]]))
        self._sizes[ids] = len(history)


@dataclass(slots=True)
class _Chain:
    """Ends (exclusive) of every n-gram of one request, most recent first."""

    last: dict[int, int] = field(default_factory=dict)  # n-gram -> its last end
    before: array[int] = field(default_factory=lambda: array("i", [0]))  # end -> the one before, 0


@dataclass(slots=True)
class _Index:
    """One request's tokens. The chains lack the last one: what ends there has no continuation."""

    tokens: list[int] = field(default_factory=list)
    singles: _Chain = field(default_factory=_Chain)
    pairs: _Chain = field(default_factory=lambda: _Chain(before=array("i", [0, 0])))
    num_linked: int = 0


class PythonLookup:
    """`NativeLookup` without kernels: the indices of requests, by draft id."""

    def __init__(self) -> None:
        self._indices: dict[int, _Index] = {}

    def append(self, ids: Ints, tokens: Tokens, counts: Ints) -> None:
        """See NativeLookup."""
        for draft_id, row, count in zip(
            ids.tolist(), tokens.tolist(), counts.tolist(), strict=True
        ):
            if count:
                self._indices.setdefault(draft_id, _Index()).tokens.extend(row[:count])

    def propose(self, ids: Ints, limits: Ints) -> Drafts:
        """See NativeLookup."""
        drafts = Drafts.empty(len(ids), int(limits.max(initial=0)))
        for row, (draft_id, limit) in enumerate(zip(ids.tolist(), limits.tolist(), strict=True)):
            if index := self._indices.get(draft_id):
                _link_all(index)
                if limit and (draft := _draft(index, limit)):
                    drafts[row] = draft
        return drafts

    def drop(self, draft_id: int) -> None:
        """See NativeLookup."""
        self._indices.pop(draft_id, None)

    def __len__(self) -> int:
        return len(self._indices)


def _link_all(index: _Index) -> None:
    """Bring the chains up to all tokens but the last."""
    tokens = index.tokens
    last, before = index.singles.last, index.singles.before
    last_pair, before_pair = index.pairs.last, index.pairs.before
    for end in range(index.num_linked + 1, len(tokens)):
        token = tokens[end - 1]
        before.append(last.get(token, 0))
        last[token] = end
        if end > 1:
            pair = tokens[end - 2] << 32 | token
            before_pair.append(last_pair.get(pair, 0))
            last_pair[pair] = end
        index.num_linked = end


def _draft(index: _Index, limit: int) -> Draft | None:
    tokens = index.tokens
    length, end, other = _longest(index, tokens)
    if not length:
        return None
    draft, stop = _continue(tokens, end, limit), length + limit
    if not other:
        return Draft(draft, _BUCKET_ALONE[length:stop])
    agreed = length + _num_equal(draft, _continue(tokens, other, limit))
    buckets = _BUCKET_AGREE[length:agreed]
    buckets += _BUCKET_DIFFER[agreed : min(agreed + 1, stop)]
    return Draft(draft, buckets + _BUCKET_ALONE[agreed + 1 : stop])


def _longest(index: _Index, tokens: Sequence[int]) -> tuple[int, int, int]:
    """(length, end, end of the next most recent one or 0) of the longest match; length 0: none."""
    size, best, chain = len(tokens), 2, index.pairs
    end = chain.last.get(tokens[-2] << 32 | tokens[-1], 0) if size > 1 else 0
    if not end:
        best, chain = 1, index.singles
        end = chain.last.get(tokens[-1], 0)
        if not end:
            return 0, 0, 0
    found = other = 0
    suffix, before = tokens[size - best :], chain.before
    for _ in range(MAX_WALK):
        if end >= best and tokens[end - best : end] == suffix:
            length = best
            most = min(MAX_MATCH, end)
            while length < most and tokens[end - 1 - length] == tokens[size - 1 - length]:
                length += 1
            if length > best or not found:
                best, found, other = length, end, 0
                suffix = tokens[size - best :]
            elif not other:
                other = end
                if best == MAX_MATCH:
                    break
        end = before[end]
        if not end:
            break
    return best, found, other


def _continue(tokens: Sequence[int], end: int, count: int) -> list[int]:
    """`count` tokens from `end` on; at the history's end they go on from `end` again."""
    out = list(tokens[end : end + count])
    while len(out) < count:
        out.append(out[end - len(tokens)])  # negative: one period back
    return out


def _num_equal(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    if a == b:
        return len(a)
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
