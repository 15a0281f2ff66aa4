"""A step's ragged rows as tensors: a pure function of the rows, without cache or model.

    row 0            row 1   row 2
    |t t t t t t t t|t      |t t t|        token_ids, positions, slots   [T]
    0               8       9     12       query_start                   [R + 1]
              (n-1) ^       ^  ^ ^ ^       logit_index                   [S]

A row is a prompt chunk, a decode token or a draft to be verified: nothing here knows which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class Row:
    """What one request computes in this step: token_ids at positions start, start + 1, ..."""

    token_ids: Sequence[int]
    start: int  # position of the first token; the KV of all earlier ones is in the cache
    block_ids: Sequence[int]  # the request's block table; covers start + len(token_ids) positions
    num_logits: int  # logits wanted for the row's last num_logits tokens; 0: none

    @property
    def context_len(self) -> int:
        """Positions that the row's last token sees, itself included."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """All rows of a step: T tokens, R rows, S wanted logits. int64, on the model's device."""

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T]: block * block_size + offset
    query_start: torch.Tensor  # [R + 1]: row r has tokens query_start[r] to query_start[r + 1]
    context_lens: torch.Tensor  # [R], new tokens included
    block_tables: torch.Tensor  # [R, max_blocks], padded with 0
    logit_index: torch.Tensor  # [S]: tokens whose logits are wanted, row by row
    block_size: int
    rows: tuple[Row, ...]  # the same in plain Python, for planning

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids.shape[0]

    @property
    def num_logits(self) -> int:
        """S."""
        return self.logit_index.shape[0]


def ranges(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The integers starts[i] .. starts[i] + lengths[i] - 1 of every i, one after the other."""
    first = np.cumsum(lengths) - lengths
    out: npt.NDArray[np.int64] = np.arange(int(lengths.sum())) + np.repeat(starts - first, lengths)
    return out


def check_rows(rows: Sequence[Row], block_size: int) -> None:
    """Raise ValueError on a row that contradicts itself."""
    for i, row in enumerate(rows):
        if len(row.token_ids) == 0 or row.start < 0:
            raise ValueError(f"row {i}: needs a token and a start of at least 0")
        if row.context_len > len(row.block_ids) * block_size:
            raise ValueError(
                f"row {i}: {len(row.block_ids)} blocks do not cover {row.context_len} positions"
            )
        if not 0 <= row.num_logits <= len(row.token_ids):
            raise ValueError(f"row {i}: num_logits must be 0 to {len(row.token_ids)}")


def build_batch(rows: Sequence[Row], block_size: int, device: torch.device) -> Batch:
    """Lay `rows` out on `device`. Raises ValueError on a row that contradicts itself."""
    check_rows(rows, block_size)
    num_tokens = np.array([len(row.token_ids) for row in rows], dtype=np.int64)
    starts = np.array([row.start for row in rows], dtype=np.int64)
    num_logits = np.array([row.num_logits for row in rows], dtype=np.int64)
    query_start = np.concatenate([[0], np.cumsum(num_tokens)]).astype(np.int64)

    token_ids = np.concatenate([np.asarray(r.token_ids, dtype=np.int64) for r in rows] or [starts])
    positions = ranges(starts, num_tokens)
    tables = np.zeros((len(rows), max((len(r.block_ids) for r in rows), default=0)), dtype=np.int64)
    for table, row in zip(tables, rows, strict=True):
        table[: len(row.block_ids)] = row.block_ids
    row_of_token = np.repeat(np.arange(len(rows)), num_tokens)
    block, offset = np.divmod(positions, block_size)
    slots = tables[row_of_token, block] * block_size + offset

    def tensor(array: npt.NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        slots=tensor(slots),
        query_start=tensor(query_start),
        context_lens=tensor(starts + num_tokens),
        block_tables=tensor(tables),
        logit_index=tensor(ranges(query_start[1:] - num_logits, num_logits)),
        block_size=block_size,
        rows=tuple(rows),
    )
