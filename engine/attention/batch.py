"""A step's ragged rows as tensors: a pure function of the rows, without cache or model.

    row 0            row 1   row 2
    |t t t t t t t t|t      |t t t|        token_ids, positions, blocks, offsets   [T]
              (n-1) ^       ^  ^ ^ ^       logit_index                             [S]

A row is a prompt chunk, a decode token or a draft to be verified; all are laid out alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True, slots=True)
class Row:
    """The tokens that one request computes in a step, at positions start, start + 1, ..."""

    token_ids: Sequence[int]
    start: int  # position of the first token; the KV of all earlier ones is in the cache
    block_ids: Sequence[int]  # the request's block table; covers start + len(token_ids) positions
    num_logits: int  # the row's last num_logits tokens get logits

    @property
    def context_len(self) -> int:
        """Positions that the row's last token sees, itself included."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Batch:
    """All rows of a step: T tokens, S of them with logits. int64, on the model's device.

    The tensors are views of one tensor, which is copied to a GPU at once.
    """

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    blocks: torch.Tensor  # [T]: the block where the token's K and V go ...
    offsets: torch.Tensor  # [T]: ... and the position in it
    logit_index: torch.Tensor  # [S]: tokens that get logits, row by row
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
    ends = np.cumsum(num_tokens)

    token_ids = np.concatenate([np.asarray(r.token_ids, dtype=np.int64) for r in rows] or [starts])
    positions = ranges(starts, num_tokens)
    entry, offsets = np.divmod(positions, block_size)
    tables = [np.asarray(r.block_ids, dtype=np.int64) for r in rows]
    first_entry = np.cumsum([0, *map(len, tables)])[:-1]
    blocks = np.concatenate(tables or [starts])[np.repeat(first_entry, num_tokens) + entry]
    logit_index = ranges(ends - num_logits, num_logits)

    parts = (token_ids, positions, blocks, offsets, logit_index)
    moved = torch.from_numpy(np.concatenate(parts)).to(device)
    views = moved.split_with_sizes([len(part) for part in parts])
    return Batch(
        token_ids=views[0],
        positions=views[1],
        blocks=views[2],
        offsets=views[3],
        logit_index=views[4],
        block_size=block_size,
        rows=tuple(rows),
    )
