"""From pairs of block ids to the fewest contiguous reads. Pure.

    remote pool   . . 4 5 6 . . 9 .          pairs (4->1) (9->7) (5->2) (6->3)
                      |-----|   |
    local pool    . 1 2 3 . . . 7 .          runs  4..6 -> 1..3   and   9 -> 7

Two pairs can share a read when both sides advance by one. Pairs whose difference (remote - local)
is equal lie on one diagonal, so the maximal runs on each diagonal are the fewest reads possible.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from kvtransfer.transport import Extent


class Run(NamedTuple):
    """`num_blocks` consecutive blocks from `remote_id` to `local_id` on."""

    remote_id: int
    local_id: int
    num_blocks: int


def coalesce(
    remote_ids: Sequence[int],
    local_ids: Sequence[int],
    *,
    num_remote_blocks: int,
    num_local_blocks: int,
) -> list[Run]:
    """The fewest runs that move remote_ids[i] to local_ids[i], by diagonal, then remote id.

    ValueError names an id out of bounds, a local id given twice, or lists of unequal length.
    """
    if len(remote_ids) != len(local_ids):
        raise ValueError(f"{len(remote_ids)} remote ids for {len(local_ids)} local ids")
    _check_bounds("remote", remote_ids, num_remote_blocks)
    _check_bounds("local", local_ids, num_local_blocks)
    _check_distinct(local_ids)
    runs: list[Run] = []
    end_remote = end_local = -1
    for _, remote, local in sorted(
        (r - d, r, d) for r, d in zip(remote_ids, local_ids, strict=True)
    ):
        if remote == end_remote and local == end_local:
            runs[-1] = runs[-1]._replace(num_blocks=runs[-1].num_blocks + 1)
        else:
            runs.append(Run(remote, local, 1))
        end_remote, end_local = remote + 1, local + 1
    return runs


def slices(runs: Iterable[Run], max_blocks: int) -> Iterator[list[Run]]:
    """The same blocks in batches of at most `max_blocks`; a longer run is cut."""
    batch: list[Run] = []
    room = max_blocks
    for remote, local, left in runs:
        while left:
            num = min(left, room)
            batch.append(Run(remote, local, num))
            remote, local, left, room = remote + num, local + num, left - num, room - num
            if not room:
                yield batch
                batch, room = [], max_blocks
    if batch:
        yield batch


def extents(runs: Iterable[Run], item_bytes: int) -> list[Extent]:
    """Runs as byte extents, of blocks (item_bytes = block_bytes) or of their generations (8)."""
    return [Extent(r * item_bytes, local * item_bytes, num * item_bytes) for r, local, num in runs]


def _check_bounds(side: str, ids: Sequence[int], num_blocks: int) -> None:
    for block_id in ids:
        if not 0 <= block_id < num_blocks:
            raise ValueError(
                f"{side} block id {block_id} is outside its pool of {num_blocks} blocks"
            )


def _check_distinct(local_ids: Sequence[int]) -> None:
    seen: set[int] = set()
    for block_id in local_ids:
        if block_id in seen:
            raise ValueError(f"local block id {block_id} is the destination of two blocks")
        seen.add(block_id)
