"""Which layers share a block, where layers see different parts of a text. Pure; no torch.

A layer with a window reads only the newest positions, so its older blocks can be given up, and need
not travel. Layers with equal windows are dealt to columns; a block table has an entry a column:

    positions   0..15  16..31  32..47  48..63
    column 0    b4     b0      b9      b2        layers that see all positions
    column 1    .      .       b7      b5        layers with a window of 20: what lies behind it
    column 2    .      .       b1      b8        is released

All columns have `num_layers` layers, so all blocks are alike and come from one pool; a column may
be padded. A model whose layers see everything has one column, and a block holds all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_COLUMNS = 8
FULL: tuple[int, ...] = (0,)  # the windows of one column that sees everything


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a model's block tables, and where each layer lies."""

    windows: tuple[int, ...]  # positions that a column's layers see; 0: all
    places: tuple[tuple[int, int], ...]  # of each layer: its column, and its place in the block
    num_layers: int  # of a block, padding included

    @classmethod
    def one(cls, num_layers: int) -> Columns:
        """One column of all layers, which keeps every block."""
        return cls(FULL, tuple((0, i) for i in range(num_layers)), num_layers)


def deal(layer_windows: Sequence[int], context: int) -> Columns:
    """Columns for layers with these windows (0: all positions) in texts of up to `context` tokens.

    The height of a column is the one that pads the fewest layers, of those that give at most
    MAX_COLUMNS; of equal ones the highest.
    """
    windows = [window if 0 < window < context else 0 for window in layer_windows]
    kinds = sorted(set(windows))
    counts = [windows.count(kind) for kind in kinds]

    def num_columns(height: int) -> int:
        return sum(-(-count // height) for count in counts)

    heights = [h for h in range(1, max(counts) + 1) if num_columns(h) <= MAX_COLUMNS]
    if not heights:
        return Columns.one(len(windows))
    height = min(heights, key=lambda h: (num_columns(h) * h, -h))
    of_column: list[int] = []
    open_column: dict[int, tuple[int, int]] = {}  # window -> its last column, layers in it
    places = []
    for kind in kinds:  # the columns of one window lie together, those that see all come first
        first = len(of_column)
        of_column += [kind] * -(-windows.count(kind) // height)
        open_column[kind] = (first, 0)
    for window in windows:
        column, used = open_column[window]
        if used == height:
            column, used = column + 1, 0
        places.append((column, used))
        open_column[window] = (column, used + 1)
    return Columns(tuple(of_column), tuple(places), height)


def first_visible(window: int, position: int, block_size: int) -> int:
    """The first block to keep for a query at `position` in a column of this window.

    It is complete once the query's own position is written, also where a block is longer than the
    window: a released entry can stand for it.
    """
    return max(0, position - max(window, block_size) + 1) // block_size if window else 0


def most_held(window: int, block_size: int, ahead: int) -> int:
    """The most blocks that a column of this window, above 0, holds of one sequence."""
    return (max(window, block_size) - 1) // block_size + 1 + ahead


def blocks_needed(windows: Sequence[int], num_tokens: int, block_size: int, ahead: int) -> int:
    """The most blocks of a pool that a request of `num_tokens` positions holds at once.

    ahead: blocks that a column with a window reserves from the position on that is computed.
    """
    whole = -(-num_tokens // block_size)
    most = (most_held(window, block_size, ahead) if window else whole for window in windows)
    return sum(min(whole, count) for count in most)


def longest_text(windows: Sequence[int], num_blocks: int, block_size: int, ahead: int) -> int:
    """The most positions for which `num_blocks` blocks of a pool suffice."""
    low, high = 0, num_blocks * block_size
    if all(windows) and sum(most_held(w, block_size, ahead) for w in windows) <= num_blocks:
        return 1 << 62
    while low < high:
        middle = (low + high + 1) // 2
        if blocks_needed(windows, middle, block_size, ahead) <= num_blocks:
            low = middle
        else:
            high = middle - 1
    return low // block_size * block_size
