"""kernels/speculation.c, called for all rows of a step at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engine.kernels import kernels
from engine.scheduling.speculation import Drafts, Ints, Tokens, grown

_WORDS = 7  # of an index, for each token that it has room for
_CAPACITY, _SIZE = 1, 2  # columns of an index's state, beside its address and what C keeps there


def native_function(name: str, signature: str) -> Callable[..., None] | None:
    """A function of the kernels, which takes arrays for pointers; None where there are none."""
    found = kernels()
    if found is None:
        return None
    function = found.function(name, signature, keeps_lock=True)

    def call(*arguments: Any) -> None:
        function(*[a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments])

    return call


class NativeLookup:
    """`PythonLookup` of ngram.py in C: the indices of requests, by draft id."""

    def __init__(
        self, append: Callable[..., None], propose: Callable[..., None], buckets: Tokens
    ) -> None:
        self._append = append
        self._propose = propose
        self._buckets = buckets  # [kind, matching tokens]
        self._memory: dict[int, Tokens] = {}
        self._state = np.zeros((16, 4), np.int64)

    def append(self, ids: Ints, tokens: Tokens, counts: Ints) -> None:
        """Append the first counts[r] of tokens [R, width] to the index of ids[r]."""
        if not len(ids):
            return
        self._state = grown(self._state, int(ids.max()) + 1)
        sizes = self._state[ids, _SIZE] + counts
        for row in np.flatnonzero(sizes > self._state[ids, _CAPACITY]):
            self._grow(int(ids[row]), int(sizes[row]))
        tokens = np.ascontiguousarray(tokens)
        self._append(self._state, ids, len(ids), tokens, tokens.shape[1], counts)

    def propose(self, ids: Ints, limits: Ints) -> Drafts:
        """Drafts of at most so many tokens each."""
        drafts = Drafts.empty(len(ids), int(limits.max(initial=0)))
        self._state = grown(self._state, int(ids.max(initial=-1)) + 1)
        self._propose(
            self._state,
            ids,
            len(ids),
            limits,
            self._buckets,
            drafts.tokens.shape[1],
            drafts.tokens,
            drafts.buckets,
            drafts.lengths,
        )
        return drafts

    def drop(self, draft_id: int) -> None:
        """Free the index of a request."""
        if self._memory.pop(draft_id, None) is not None:
            self._state[draft_id] = 0

    def __len__(self) -> int:
        return len(self._memory)

    def _grow(self, draft_id: int, size: int) -> None:
        """Move the tokens of an index to more memory; its chains are made anew."""
        capacity = 1 << max(5, size.bit_length())
        memory = np.zeros(_WORDS * capacity, np.int32)
        known = int(self._state[draft_id, _SIZE])
        if known:
            memory[:known] = self._memory[draft_id][:known]
        self._memory[draft_id] = memory
        self._state[draft_id] = (memory.ctypes.data, capacity, known, 0)


def native_lookup(buckets: Tokens) -> NativeLookup | None:
    """One with these buckets; None where there are no kernels."""
    append = native_function("diptych_ngram_append", "ppipqp")
    propose = native_function("diptych_ngram_propose", "ppippqppp")
    return NativeLookup(append, propose, buckets) if append and propose else None
