"""From pairs of block ids, and the heads that either side holds, to the fewest reads. Pure.

    remote pool   . . 4 5 6 . . 9 .          pairs (4->1) (9->7) (5->2) (6->3)
                      |-----|   |
    local pool    . 1 2 3 . . . 7 .          runs  4..6 -> 1..3   and   9 -> 7

Two pairs can share a read when both sides advance by one. Pairs whose difference (remote - local)
is equal lie on one diagonal, so the maximal runs on each diagonal are the fewest reads possible.

Workers may split the KV heads over different numbers of ranks. A rank reads what it holds of each
block in pieces, one a remote rank and group of layers:

    remote block   | rank 0: heads 0 1 | rank 1: heads 2 3 |       4 heads over 2 ranks
    local block    | rank 0: heads 0 1 2 3                 |       over 1: two pieces

A block is head-major, so a piece is one extent. Blocks coalesce only where the piece is all of a
block on both sides, as it is between workers that split alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from kvtransfer.transport import Extent, Region


class Piece(NamedTuple):
    """The same bytes of every block: what one remote region and the local one both hold."""

    region: int  # index of the remote region
    remote_offset: int  # from the start of a block
    local_offset: int
    num_bytes: int


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
    if repeated := [block_id for block_id, count in Counter(local_ids).items() if count > 1]:
        raise ValueError(f"local block id {repeated[0]} is the destination of two blocks")
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


def pieces(remote: Sequence[Region], local: Region) -> list[Piece]:
    """What to read of each block: every head that `local` holds, of each group, exactly once.

    `remote` are a peer's blocks, by rank. Where several ranks hold a head, local ranks spread over
    them. ValueError: the groups differ, or no rank holds a head.
    """
    rank = local.rank
    alike = [
        i for i, r in enumerate(remote) if (r.groups, r.stride) == (local.groups, local.stride)
    ]
    if alike:
        return [Piece(alike[rank % len(alike)], 0, 0, local.stride)]
    expected = [group.head_bytes for group in local.groups]
    for region in remote:
        sizes = [group.head_bytes for group in region.groups]
        if sizes != expected:
            raise ValueError(f"layer groups with heads of {sizes} bytes; expected {expected}")
    found: list[Piece] = []
    for index, ours in enumerate(local.groups):
        head, end = ours.first_head, ours.first_head + ours.num_heads
        while head < end:
            holders = [i for i, r in enumerate(remote) if head in r.groups[index].heads]
            if not holders:
                raise ValueError(f"KV head {head} of layer group {index} is on no rank")
            holder = holders[rank % len(holders)]
            theirs = remote[holder].groups[index]
            count = min(end, theirs.heads.stop) - head
            source, target = theirs.offset_of(head), ours.offset_of(head)
            found.append(Piece(holder, source, target, count * ours.head_bytes))
            head += count
    return found


def extents(
    runs: Iterable[Run], piece: Piece, *, remote_stride: int, local_stride: int
) -> list[Extent]:
    """A piece of each block as byte extents: one a run for a whole block, else one a block.

    The strides are the bytes from one block to the next.
    """
    _, source, target, size = piece
    if size == remote_stride == local_stride:
        return [Extent(r * size, local * size, num * size) for r, local, num in runs]
    return [
        Extent((r + i) * remote_stride + source, (local + i) * local_stride + target, size)
        for r, local, num in runs
        for i in range(num)
    ]


def _check_bounds(side: str, ids: Sequence[int], num_blocks: int) -> None:
    for block_id in ids:
        if not 0 <= block_id < num_blocks:
            raise ValueError(
                f"{side} block id {block_id} is outside its pool of {num_blocks} blocks"
            )
