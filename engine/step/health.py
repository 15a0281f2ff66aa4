"""Checks of an engine's numbers, which the step loop calls.

    each step      are the keys and values of prompt chunks finite?      (the sampler checks logits)
    after a fault  which complete blocks are damaged? does the self-test still pass?

Only the self-test finds numbers that are finite and wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from engine.attention.batch import Row, StepRows, ranges
from engine.cache.kv_cache import KVCache


class Health:
    """The checks, on the engine thread. These find nothing: for engines without a KV pool."""

    def unsound_prompts(self, rows: Sequence[Row]) -> list[int]:
        """Indices of the rows with keys and values that are not finite.

        Only rows that a step just computed without all their logits are checked.
        """
        return []

    def damaged(self, blocks: Sequence[int]) -> list[int]:
        """The complete blocks among these that hold numbers which are not finite."""
        return []

    def self_test(self) -> None:
        """Raise SelfTestFailed unless a fixed prompt gives the logits of the start."""


class EngineHealth(Health):
    """Reads the KV pool, on the engine thread."""

    def __init__(self, kv_cache: KVCache, self_tests: Sequence[Callable[[], None]]) -> None:
        self._kv_cache = kv_cache
        self._self_tests = self_tests

    def unsound_prompts(self, rows: Sequence[Row]) -> list[int]:
        """See Health. Free in a step of answers alone: their logits show it."""
        step = StepRows.of(rows)
        some = np.flatnonzero(step.num_logits < step.num_tokens)
        if not len(some):
            return []
        layout = self._kv_cache.layout
        size, (column, _) = layout.block_size, layout.place(layout.total_layers - 1)
        step = step.column(column)
        starts, lengths = step.starts[some], step.num_tokens[some]
        block_ids = [np.asarray(step.tables[i], np.int64) for i in some.tolist()]
        entry, offsets = np.divmod(ranges(starts, lengths), size)
        first = np.cumsum([0, *map(len, block_ids)])[:-1]
        tables = np.concatenate(block_ids)
        finite = self._kv_cache.finite(tables[np.repeat(first, lengths) + entry], offsets)
        owners = np.repeat(some, lengths)
        return [int(i) for i in np.unique(owners[~finite])]

    def damaged(self, blocks: Sequence[int]) -> list[int]:
        """See Health."""
        return self._kv_cache.damaged(blocks)

    def self_test(self) -> None:
        """See Health."""
        for test in self._self_tests:
            test()
