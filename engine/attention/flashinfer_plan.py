"""FlashInfer's index arrays, computed from a step's rows by pure functions on the CPU.

FlashInfer reads a paged cache through four arrays (rows of 40, 16 and 5 positions, blocks of 16):

    kv_indptr         0     3  4  5      row r owns kv_indices[kv_indptr[r]:kv_indptr[r + 1]]
    kv_indices        b0 b1 b2 b3 b4     block ids
    kv_last_page_len  8  16  5           positions used in the row's last block, 1 to block_size
    qo_indptr         0 ...              row r owns queries qo_indptr[r] to qo_indptr[r + 1]

Rows of one token go to the decode kernel; prompt chunks and drafts under verification go to the
prefill kernel, whose causal mask aligns the last query with the last key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.attention.batch import Row, StepRows, ranges


@dataclass(frozen=True, slots=True)
class PagedIndices:
    """The rows of one kernel call. The first four are FlashInfer's arguments, int32."""

    qo_indptr: npt.NDArray[np.int32]  # [n + 1]
    kv_indptr: npt.NDArray[np.int32]  # [n + 1]
    kv_indices: npt.NDArray[np.int32]  # [kv_indptr[-1]]
    kv_last_page_len: npt.NDArray[np.int32]  # [n]
    tokens: npt.NDArray[np.int64]  # [qo_indptr[-1]]: the step's tokens that are the queries


@dataclass(frozen=True, slots=True)
class StepIndices:
    """A step's rows, by kernel; None where no row needs that kernel."""

    decode: PagedIndices | None
    prefill: PagedIndices | None
    tokens: npt.NDArray[np.int64]  # [T]: decode's tokens, then prefill's
    order: npt.NDArray[np.int64]  # [T]: index of a token's output among those

    @property
    def in_order(self) -> bool:
        """Whether the step's tokens are in that order already."""
        return bool((self.order[1:] > self.order[:-1]).all())


def paged_indices(
    rows: Sequence[Row], first_token: npt.NDArray[np.int64], block_size: int
) -> PagedIndices:
    """Index arrays of `rows`; `first_token` [n]: each row's first token, counted in the step."""
    lengths = np.array([len(row.token_ids) for row in rows], dtype=np.int64)
    context = np.array([row.context_len for row in rows], dtype=np.int64)
    num_blocks = -(-context // block_size)
    used = [row.block_ids[:count] for row, count in zip(rows, num_blocks.tolist(), strict=True)]
    return PagedIndices(
        qo_indptr=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        kv_indptr=np.concatenate([[0], np.cumsum(num_blocks)]).astype(np.int32),
        kv_indices=np.concatenate([np.asarray(ids, dtype=np.int32) for ids in used]),
        kv_last_page_len=(context - (num_blocks - 1) * block_size).astype(np.int32),
        tokens=ranges(first_token, lengths),
    )


def step_indices(rows: Sequence[Row], block_size: int) -> StepIndices:
    """Index arrays of a whole step, rows of one token apart from the others."""
    step, listed = StepRows.of(rows), list(rows)
    lengths = step.num_tokens
    first_token = np.cumsum(lengths) - lengths
    parts: list[PagedIndices | None] = []
    for chosen in (np.flatnonzero(lengths == 1), np.flatnonzero(lengths > 1)):
        some = [listed[i] for i in chosen.tolist()]
        parts.append(paged_indices(some, first_token[chosen], block_size) if some else None)
    joined = np.concatenate([part.tokens for part in parts if part is not None] or [lengths])
    order = np.empty_like(joined)
    order[joined] = np.arange(len(joined), dtype=np.int64)
    return StepIndices(decode=parts[0], prefill=parts[1], tokens=joined, order=order)
