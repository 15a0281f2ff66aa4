"""A model whose logits are a hash of the history that it *reads back* from paged memory.

It stores, for every slot written, which token at which position it is the KV of, and follows block
tables to read a row's context. A block that was reused, never written or taken from another
sequence gives other logits, so that any mistake in blocks, positions, drafts or preemption changes
tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from engine.attention.batch import Row
from engine.base.kv_columns import FULL
from engine.runner.base import ModelRunner, StepOutput

VOCAB = 50


def logits_of(history: Sequence[object]) -> torch.Tensor:
    """[VOCAB] float32, a pure function of the history; peaked enough that n-grams repeat now and
    then."""
    tail = repr(tuple(history[-1:])).encode()  # a short memory makes text that repeats itself
    whole = repr(tuple(history)).encode()
    a = np.random.default_rng(
        int.from_bytes(hashlib.blake2b(tail, digest_size=8).digest(), "little")
    )
    b = np.random.default_rng(
        int.from_bytes(hashlib.blake2b(whole, digest_size=8).digest(), "little")
    )
    values = 3.0 * a.standard_normal(VOCAB) + 0.1 * b.standard_normal(VOCAB)
    return torch.from_numpy(values.astype(np.float32))


def seen(tokens: Sequence[object], windows: Sequence[int] = FULL) -> list[object]:
    """What layers with these windows (0: all) read of a text, one column after the other."""
    return [token for window in windows for token in tokens[-window:]]


def places(row: Row, position: int, size: int, windows: Sequence[int]) -> list[tuple[int, int]]:
    """(block, offset) of what a query at `position` of `row` reads, one column after the other."""
    table = np.asarray(row.block_ids).reshape(len(row.block_ids), -1)
    return [
        (int(table[p // size, column]), p % size)
        for column, window in enumerate(windows)
        for p in range(max(0, position - window + 1) if window else 0, position + 1)
    ]


class HistoryRunner(ModelRunner):
    """Looks like engine.runner.Runner, of a model whose layers lie in columns of `windows`."""

    def __init__(self, num_blocks: int, block_size: int, windows: Sequence[int] = FULL) -> None:
        self.block_size = block_size
        self.windows = windows
        self.memory: list[list[object]] = [
            ["never written"] * block_size for _ in range(num_blocks)
        ]
        self.num_tokens = 0
        self.steps: list[list[Row]] = []
        self.fail_next = 0

    def launch(self, rows: Sequence[Row]) -> StepOutput:
        return StepOutput(self.compute(rows))

    def compute(self, rows: Sequence[Row]) -> torch.Tensor:
        """The logits; what a test replaces to change them."""
        if self.fail_next:
            self.fail_next -= 1
            raise RuntimeError("the device said no")
        self.steps.append(list(rows))
        size = self.block_size
        for row in rows:
            for ahead, token in enumerate(row.token_ids):
                entry, offset = divmod(row.start + ahead, size)
                for block in np.atleast_1d(row.block_ids[entry]).tolist():
                    self.memory[block][offset] = token
                self.num_tokens += 1
        out = []
        for row in rows:
            end = row.start + len(row.token_ids)
            for position in range(end - row.num_logits, end):
                at = places(row, position, size, self.windows)
                out.append(logits_of([self.memory[block][offset] for block, offset in at]))
        return torch.stack(out) if out else torch.empty(0, VOCAB)
