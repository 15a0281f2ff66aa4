"""Masks of a step: which tokens each position may give, computed while the model computes.

    begin(places) -> a thread of ours -> of each place 1 + len(draft) rows of bits
         |                                  |
         '---- the forward pass ------------'     one buffer, good until the next `begin`

Matchers belong to that thread in between. One call for all places with drafts and one for the
others; the library spreads them over its own threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from llguidance import LLExecutor
from numpy.typing import NDArray

from engine.constraints.matcher import Matcher
from engine.native.threads import usable_cores

_WAIT_S = 30.0
_MOST_THREADS = 8
Rows = NDArray[np.int32]  # [positions, words]: bit t % 32 of word t // 32 is token t


@dataclass(frozen=True, slots=True)
class Place:
    """An answer that is to go on, and the guess that it is to be verified with."""

    matcher: Matcher
    draft: Sequence[int]  # it could come: see Matcher.num_valid


class Masks:
    """Owned by the engine thread."""

    def __init__(self, vocab_size: int) -> None:
        self._num_words = -(-vocab_size // 32)
        self._executor = LLExecutor(min(_MOST_THREADS, max(1, usable_cores() // 2)))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._buffer = np.empty((0, self._num_words), np.int32)

    def begin(self, places: Mapping[int, Place]) -> Future[dict[int, Rows]]:
        """Compute the masks of these places, by the keys that they have here."""
        num_rows = sum(1 + len(place.draft) for place in places.values())
        if num_rows > len(self._buffer):
            self._buffer = np.empty((2 * num_rows, self._num_words), np.int32)
        return self._thread.submit(self._fill, places, self._buffer[:num_rows])

    @staticmethod
    def wait(masks: Future[dict[int, Rows]]) -> dict[int, Rows]:
        """The masks; raises TimeoutError."""
        return masks.result(_WAIT_S)

    def _fill(self, places: Mapping[int, Place], rows: Rows) -> dict[int, Rows]:
        rows.fill(-1)  # a row behind a guess that cannot come is never used
        plain, drafted, first = [], [], 0
        parts: dict[int, Rows] = {}
        for key, place in places.items():
            if place.draft:
                drafted.append((place.matcher.library, first, list(place.draft)))
            else:
                plain.append((place.matcher.library, first))
            parts[key] = rows[first : first + 1 + len(place.draft)]
            first += 1 + len(place.draft)
        where = (rows.ctypes.data, 4 * self._num_words, len(rows))
        if plain:
            self._executor.unsafe_compute_mask_ptr(plain, *where)
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, *where)
        for key, place in places.items():
            place.matcher.bound_numbers(parts[key], place.draft)
        return parts
