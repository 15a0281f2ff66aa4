"""The blocks of one sequence, in order: one for each column of the model's layers (kv_columns.py).

    position   0 .......... | block_size ...... |            position p: entry p // block_size,
    column 0   b0           | b1                | ...                    offset p % block_size
    column 1   (released)   | b7                | ...        behind the column's window
    ids        [b0, b1, ...], or [[b0, b7], [b1, b7], ...] with two columns: for the model, edited
               when blocks are added and replaced when some are released

A released entry repeats the id of the oldest block that the column still holds: what reads a whole
tile, and masks what its window hides, reads only blocks of this sequence.

    column with a window    |. . . . . . . |b b b b b|b b b b|. . . . .|
                            0              ^ visible ^ computed        end
                                                     '- ahead -'
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.base.kv_columns import FULL, first_visible, most_held
from engine.scheduling.block_pool import BlockPool

_NONE: NDArray[np.int32] = np.empty(0, np.int32)


class BlockTable:
    """A sequence's references to its blocks: one in the pool for every block that it holds."""

    __slots__ = (
        "_ahead",
        "_columns",
        "_end",
        "_firsts",
        "_pool",
        "_room",
        "_size",
        "_windows",
        "ids",
    )

    def __init__(
        self, pool: BlockPool, block_size: int, windows: Sequence[int] = FULL, ahead: int = 0
    ) -> None:
        """`ahead`: blocks that a column with a window holds from the next position on."""
        self._pool = pool
        self._size = block_size
        self._windows = windows
        self._ahead = ahead
        self._columns: list[list[int]] = [[] for _ in windows]
        self._firsts = [0] * len(windows)  # entries before these are released
        self._end = 0  # entries to be reserved in the end
        self._room = _NONE  # grows by doubling
        self.ids = _NONE  # view of `_room`; int32 [entries], or [entries, columns]

    @property
    def num_entries(self) -> int:
        """Entries that all columns have."""
        return min(map(len, self._columns))

    @property
    def num_positions(self) -> int:
        """Positions that fit."""
        return self.num_entries * self._size

    @property
    def blocks(self) -> list[int]:
        """Every block that is held, column by column."""
        return self.held(0, max(map(len, self._columns)))

    def held(self, first: int, end: int) -> list[int]:
        """The blocks of entries first .. end - 1 that are held, column by column."""
        return [
            block
            for column, start in zip(self._columns, self._firsts, strict=True)
            for block in column[max(first, start) : end]
        ]

    def entry(self, index: int, since: int = 0) -> list[tuple[int, int]]:
        """(column, block) of one entry; `since`: only what a query at that position still reads."""
        return [
            (c, column[index])
            for c, column in enumerate(self._columns)
            if index >= max(self._firsts[c], self._first_visible(c, since))
        ]

    def covers(self, position: int) -> bool:
        """Whether every column holds what a query at `position` reads."""
        return all(f <= self._first_visible(c, position) for c, f in enumerate(self._firsts))

    def missing(self, num_tokens: int) -> int:
        """Blocks still to take before `num_tokens` positions fit."""
        entries = -(-num_tokens // self._size)
        return sum(max(0, entries - len(column)) for column in self._columns)

    def needed(self, hits: Sequence[Sequence[int]], num_hits: int, position: int, end: int) -> int:
        """Blocks that `open` would take with these arguments."""
        starts = (max(num_hits, self._first_visible(c, position)) for c in range(len(hits)))
        limits = (self._limit(c, position, end) for c in range(len(hits)))
        return sum(max(0, limit - start) for start, limit in zip(starts, limits, strict=True))

    def open(self, hits: Sequence[Sequence[int]], num_hits: int, position: int, end: int) -> None:
        """Start with prefix hits, which are pinned here, and take the blocks of what follows.

        Args:
            hits: of each column the last blocks of the entries before `num_hits`.
            num_hits: entries that are complete.
            position: the first one that is computed here; a window begins before it.
            end: entries that the sequence will need; a column with a window gets some of them.

        Raises:
            NoRoom: nothing was taken.
        """
        assert not any(self._columns), "hits come first"
        self._end = end
        pinned = [block for column in hits for block in column]
        self._pool.pin(pinned)
        try:
            taken = iter(self._pool.take(self.needed(hits, num_hits, position, end)))
        except BaseException:
            self._pool.release(pinned)
            raise
        for c, found in enumerate(hits):
            start = max(num_hits, self._first_visible(c, position))
            new = [next(taken) for _ in range(start, self._limit(c, position, end))]
            held = [*found, *new]
            self._firsts[c] = start - len(found)
            self._columns[c] = [held[0] if held else 0] * self._firsts[c] + held
        self._show()

    def reserve(self, num_tokens: int) -> None:
        """Take blocks until `num_tokens` positions fit, or none at all and raise NoRoom."""
        entries = -(-num_tokens // self._size)
        self._end = max(self._end, entries)
        self._extend([entries] * len(self._columns))

    def reserve_ahead(self, position: int) -> None:
        """Take the next blocks of columns with a window, once `position` is computed next.

        Raises NoRoom: nothing was taken.
        """
        if any(self._windows):
            self._extend([self._limit(c, position, self._end) for c in range(len(self._columns))])

    def release_behind(self, position: int) -> bool:
        """Release what no query from `position` on reads; returns whether the table has changed."""
        released = []
        for c, column in enumerate(self._columns):
            first = min(self._first_visible(c, position), len(column) - 1)
            if first > self._firsts[c]:
                released += column[self._firsts[c] : first]
                column[:first] = [column[first]] * first
                self._firsts[c] = first
        if released:
            self._pool.release(released)
            self._room = _NONE
            self._show()
        return bool(released)

    def release(self) -> None:
        """Give up everything."""
        blocks = self.blocks
        self._columns = [[] for _ in self._windows]
        self._firsts = [0] * len(self._windows)
        self._room = self.ids = _NONE
        self._end = 0
        self._pool.release(blocks)

    def _first_visible(self, column: int, position: int) -> int:
        return first_visible(self._windows[column], position, self._size)

    def _limit(self, column: int, position: int, end: int) -> int:
        """Entries to have in a column while `position` is computed."""
        if not (window := self._windows[column]):
            return end
        first = self._first_visible(column, position)
        return min(end, first + most_held(window, self._size, self._ahead))

    def _extend(self, entries: Sequence[int]) -> None:
        """Take blocks until each column has so many entries, or none and raise NoRoom."""
        counts = [max(0, n - len(c)) for n, c in zip(entries, self._columns, strict=True)]
        if not any(counts):
            return
        taken = iter(self._pool.take(sum(counts)))
        for column, count in zip(self._columns, counts, strict=True):
            column += [next(taken) for _ in range(count)]
        self._show()

    def _show(self) -> None:
        """Bring `ids` up to date: entries are added in place, behind those that are shown."""
        count, shown = self.num_entries, len(self.ids) if len(self._room) else 0
        if count > len(self._room):
            columns = len(self._columns)
            room = np.empty((max(16, 2 * count), *([columns] if columns > 1 else [])), np.int32)
            if shown:
                room[:shown] = self._room[:shown]
            self._room = room
        if len(self._columns) == 1:
            self._room[shown:count] = self._columns[0][shown:count]
        else:
            self._room[shown:count] = np.transpose([c[shown:count] for c in self._columns])
        self.ids = self._room[:count]
