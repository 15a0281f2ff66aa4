"""A step's ragged rows as tensors: a pure function of the rows, without cache or model.

    row 0            row 1   row 2
    |t t t t t t t t|t      |t t t|        token_ids, positions, blocks, offsets   [T]
              (n-1) ^       ^  ^ ^ ^       logit_index                             [S]

A row is a prompt chunk, a decode token or a draft to be verified; all are laid out alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch

# Of a row: [entries], or [entries, columns] where its model's block tables have several columns.
BlockIds = Sequence[int] | npt.NDArray[np.int32]
Tables = Sequence[BlockIds]
Ints = npt.NDArray[np.int64]


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


@dataclass(frozen=True, eq=False)
class StepRows(Sequence[Row]):
    """The rows of a step as arrays; Rows on demand, of all of them at once."""

    token_ids: Ints  # [T] of all rows, one after the other
    starts: Ints  # [R]
    num_tokens: Ints  # [R]
    num_logits: Ints  # [R]
    tables: Tables  # R block tables

    @classmethod
    def of(cls, rows: Sequence[Row]) -> StepRows:
        """The same rows as arrays."""
        if isinstance(rows, StepRows):
            return rows
        return cls(
            np.array(list(chain.from_iterable(row.token_ids for row in rows)), np.int64),
            np.array([row.start for row in rows], np.int64),
            np.array([len(row.token_ids) for row in rows], np.int64),
            np.array([row.num_logits for row in rows], np.int64),
            [row.block_ids for row in rows],
        )

    def followed_by(self, rows: Sequence[Row]) -> StepRows:
        """These rows and then others."""
        if not rows:
            return self
        other = StepRows.of(rows)
        return StepRows(
            np.concatenate([self.token_ids, other.token_ids]),
            np.concatenate([self.starts, other.starts]),
            np.concatenate([self.num_tokens, other.num_tokens]),
            np.concatenate([self.num_logits, other.num_logits]),
            [*self.tables, *other.tables],
        )

    def column(self, index: int) -> StepRows:
        """The same rows with one column of their block tables."""
        return replace(self, tables=[_column_of(table, index) for table in self.tables])

    def check(self, block_size: int) -> None:
        """Raise ValueError on a row that contradicts itself."""
        num_blocks = np.fromiter(map(len, self.tables), np.int64, len(self.tables))
        ends = self.starts + self.num_tokens
        wrong = (self.num_tokens <= 0) | (self.starts < 0) | (ends > num_blocks * block_size)
        wrong |= (self.num_logits < 0) | (self.num_logits > self.num_tokens)
        for i in np.flatnonzero(wrong).tolist():
            if self.num_tokens[i] == 0 or self.starts[i] < 0:
                raise ValueError(f"row {i}: needs a token and a start of at least 0")
            if ends[i] > num_blocks[i] * block_size:
                raise ValueError(
                    f"row {i}: {num_blocks[i]} blocks do not cover {ends[i]} positions"
                )
            raise ValueError(f"row {i}: num_logits must be 0 to {self.num_tokens[i]}")

    def __len__(self) -> int:
        return len(self.tables)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return list(self)[index]

    def __iter__(self) -> Iterator[Row]:
        first, token_ids = 0, self.token_ids.tolist()
        columns = (self.starts.tolist(), self.num_tokens.tolist(), self.num_logits.tolist())
        for start, count, num_logits, table in zip(*columns, self.tables, strict=True):
            yield Row(token_ids[first : first + count], start, table, num_logits)
            first += count


def _column_of(table: BlockIds, index: int) -> BlockIds:
    """A column of a row's block table; a table of one column stands for all."""
    return table[:, index] if isinstance(table, np.ndarray) and table.ndim > 1 else table


@dataclass(frozen=True, slots=True)
class Batch:
    """All rows of a step: T tokens, S of them with logits. int64, on the model's device.

    The tensors are views of one tensor, which is copied to a GPU at once.
    """

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    blocks: torch.Tensor  # [columns, T]: the blocks where the token's K and V go ...
    offsets: torch.Tensor  # [T]: ... and the position in it
    logit_index: torch.Tensor  # [S]: tokens that get logits, row by row
    block_size: int
    rows: StepRows  # the same on the host, for planning

    def column(self, index: int) -> Batch:
        """The batch with one column of its block tables, for planning."""
        if len(self.blocks) == 1:
            return self
        rows = self.rows.column(index)
        return replace(self, blocks=self.blocks[index : index + 1], rows=rows)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_ids.shape[0]

    @property
    def num_logits(self) -> int:
        """S."""
        return self.logit_index.shape[0]


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """The integers starts[i] .. starts[i] + lengths[i] - 1 of every i, one after the other."""
    if (lengths == 1).all():
        return starts.copy()
    first = np.cumsum(lengths) - lengths
    out: Ints = np.arange(int(lengths.sum())) + np.repeat(starts - first, lengths)
    return out


class TableStaging:
    """The block tables of a step's rows as one array, which is edited and not rebuilt.

    A table that is an array is never changed by its owner, only replaced when a block is added; so
    an array that is the same object as in the last step is there already.
    """

    def __init__(self, num_columns: int = 1) -> None:
        self._num_columns = num_columns
        self._tables: npt.NDArray[np.int32] = np.zeros((num_columns, 0, 0), np.int32)
        self._staged: list[BlockIds] = []

    def lay_out(self, rows: Sequence[Row]) -> npt.NDArray[np.int32]:
        """int32 [columns, at least len(rows), stride], for the model's block tables.

        Entries beyond a row's table are of no meaning.
        """
        tables, staged = self._tables, self._staged
        all_ids = StepRows.of(rows).tables
        width = max(map(len, all_ids))
        if len(rows) > tables.shape[1] or width > tables.shape[2]:
            height, stride = max(2 * len(rows), tables.shape[1]), max(2 * width, tables.shape[2])
            tables = self._tables = np.zeros((self._num_columns, height, stride), np.int32)
            staged.clear()
        staged += [()] * (len(all_ids) - len(staged))
        for i, (before, block_ids) in enumerate(zip(staged, all_ids, strict=False)):
            if before is not block_ids or not isinstance(block_ids, np.ndarray):
                staged[i] = block_ids
                tables[:, i, : len(block_ids)] = np.transpose(block_ids)
        return tables


class BatchBuilder:
    """Lays the rows of steps out on a device, through one host buffer that it reuses.

    A batch on the CPU is a view of that buffer: it is valid until the next one is built.
    """

    def __init__(self, block_size: int, device: torch.device, num_columns: int = 1) -> None:
        """`num_columns`: of the rows' block tables."""
        self._block_size = block_size
        self._num_columns = num_columns
        self._device = device
        self._host = self._allocate(1024)

    def _allocate(self, size: int) -> torch.Tensor:
        on_gpu = self._device.type == "cuda"
        return torch.empty(size, dtype=torch.int64, pin_memory=on_gpu)

    def build(self, rows: Sequence[Row]) -> Batch:
        """The batch of `rows`. Raises ValueError on a row that contradicts itself."""
        step = StepRows.of(rows)
        step.check(self._block_size)
        num_tokens, num_logits = step.num_tokens, step.num_logits
        total, num_wanted = int(num_tokens.sum()), int(num_logits.sum())
        num_columns = self._num_columns
        width = 3 + num_columns
        size = width * total + num_wanted
        if size > len(self._host):
            self._host = self._allocate(2 * size)
        host = self._host.numpy()
        token_ids, positions, offsets, *blocks = host[: width * total].reshape(width, total)
        token_ids[:] = step.token_ids
        positions[:] = ranges(step.starts, num_tokens)
        entry, offsets[:] = np.divmod(positions, self._block_size)
        for column, ids in enumerate(blocks):
            ids[:] = self._blocks(step.column(column), entry)
        host[width * total : size] = ranges(np.cumsum(num_tokens) - num_logits, num_logits)
        moved = self._host[:size].to(self._device, non_blocking=True)
        views = moved.split_with_sizes([total] * 3 + [num_columns * total, num_wanted])
        into = views[3].view(num_columns, total)
        return Batch(views[0], views[1], into, views[2], views[4], self._block_size, step)

    @staticmethod
    def _blocks(step: StepRows, entry: Ints) -> Ints:
        """The block of each token; `entry`: its index in the table of its row."""
        if len(entry) <= 4 * len(step):  # few tokens a row: no table need be copied
            owners = np.repeat(np.arange(len(step)), step.num_tokens).tolist()
            ids = [step.tables[row][i] for row, i in zip(owners, entry.tolist(), strict=True)]
            return np.array(ids, np.int64)
        tables = [np.asarray(table, np.int32) for table in step.tables]
        first_entry = np.cumsum([0, *map(len, tables)])[:-1]
        joined = np.concatenate(tables)[np.repeat(first_entry, step.num_tokens) + entry]
        return joined.astype(np.int64)
