"""A step's ragged rows as tensors: a pure function of the rows, without cache or model.

    row 0            row 1   row 2
    |t t t t t t t t|t      |t t t|        token_ids, positions, blocks, offsets   [T]
              (n-1) ^       ^  ^ ^ ^       logit_index                             [S]

A row is a prompt chunk, a decode token or a draft to be verified; all are laid out alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

BlockIds = Sequence[int] | npt.NDArray[np.int32]


class Row(NamedTuple):
    """The tokens that one request computes in a step, at positions start, start + 1, ..."""

    token_ids: Sequence[int]
    start: int  # position of the first token; the KV of all earlier ones is in the cache
    block_ids: BlockIds  # the request's block table; covers start + len(token_ids) positions
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
        num_tokens = len(row.token_ids)
        if (
            num_tokens > 0 <= row.start
            and row.start + num_tokens <= len(row.block_ids) * block_size
            and 0 <= row.num_logits <= num_tokens
        ):
            continue
        if num_tokens == 0 or row.start < 0:
            raise ValueError(f"row {i}: needs a token and a start of at least 0")
        if row.context_len > len(row.block_ids) * block_size:
            raise ValueError(
                f"row {i}: {len(row.block_ids)} blocks do not cover {row.context_len} positions"
            )
        raise ValueError(f"row {i}: num_logits must be 0 to {num_tokens}")


class TableStaging:
    """The block tables of a step's rows as one array, which is edited and not rebuilt.

    A table that is an array is never changed by its owner, only replaced when a block is added; so
    an array that is the same object as in the last step is there already.
    """

    def __init__(self) -> None:
        self._tables: npt.NDArray[np.int32] = np.zeros((0, 0), np.int32)
        self._staged: list[BlockIds] = []

    def lay_out(self, rows: Sequence[Row]) -> npt.NDArray[np.int32]:
        """int32 [at least len(rows), stride]; entries beyond a row's table are of no meaning."""
        tables, staged = self._tables, self._staged
        width = max(len(row.block_ids) for row in rows)
        if len(rows) > tables.shape[0] or width > tables.shape[1]:
            height = max(2 * len(rows), tables.shape[0])
            tables = self._tables = np.zeros((height, max(2 * width, tables.shape[1])), np.int32)
            staged.clear()
        for i, row in enumerate(rows):
            block_ids = row.block_ids
            if i < len(staged):
                if staged[i] is block_ids and isinstance(block_ids, np.ndarray):
                    continue
                staged[i] = block_ids
            else:
                staged.append(block_ids)
            tables[i, : len(block_ids)] = block_ids
        return tables


class BatchBuilder:
    """Lays the rows of steps out on a device, through one host buffer that it reuses.

    A batch on the CPU is a view of that buffer: it is valid until the next one is built.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._host = self._allocate(1024)

    def _allocate(self, size: int) -> torch.Tensor:
        on_gpu = self._device.type == "cuda"
        return torch.empty(size, dtype=torch.int64, pin_memory=on_gpu)

    def build(self, rows: Sequence[Row]) -> Batch:
        """The batch of `rows`. Raises ValueError on a row that contradicts itself."""
        check_rows(rows, self._block_size)
        num_tokens = np.array([len(row.token_ids) for row in rows], dtype=np.int64)
        starts = np.array([row.start for row in rows], dtype=np.int64)
        num_logits = np.array([row.num_logits for row in rows], dtype=np.int64)
        total, num_wanted = int(num_tokens.sum()), int(num_logits.sum())
        size = 4 * total + num_wanted
        if size > len(self._host):
            self._host = self._allocate(2 * size)
        host = self._host.numpy()
        token_ids, positions, blocks, offsets = host[: 4 * total].reshape(4, total)
        token_ids[:] = list(chain.from_iterable(row.token_ids for row in rows))
        positions[:] = ranges(starts, num_tokens)
        entry, offsets[:] = np.divmod(positions, self._block_size)
        blocks[:] = self._blocks(rows, num_tokens, entry)
        host[4 * total : size] = ranges(np.cumsum(num_tokens) - num_logits, num_logits)
        moved = self._host[:size].to(self._device, non_blocking=True)
        views = moved.split_with_sizes([total] * 4 + [num_wanted])
        return Batch(
            token_ids=views[0],
            positions=views[1],
            blocks=views[2],
            offsets=views[3],
            logit_index=views[4],
            block_size=self._block_size,
            rows=tuple(rows),
        )

    @staticmethod
    def _blocks(
        rows: Sequence[Row], num_tokens: npt.NDArray[np.int64], entry: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """The block of each token; `entry`: its index in the table of its row."""
        if len(entry) == len(rows):  # one token a row: no table need be copied
            ids = [row.block_ids[i] for row, i in zip(rows, entry.tolist(), strict=True)]
            return np.array(ids, np.int64)
        tables = [np.asarray(row.block_ids, np.int32) for row in rows]
        first_entry = np.cumsum([0, *map(len, tables)])[:-1]
        joined = np.concatenate(tables)[np.repeat(first_entry, num_tokens) + entry]
        return joined.astype(np.int64)


def build_batch(rows: Sequence[Row], block_size: int, device: torch.device) -> Batch:
    """Lay `rows` out on `device` once. Raises ValueError on a row that contradicts itself."""
    return BatchBuilder(block_size, device).build(rows)
