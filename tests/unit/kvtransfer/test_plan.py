"""Planning: every byte once, as few reads as there can be, nothing out of bounds."""

import dataclasses
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.base.kv_layout import KVLayout, LayerGroup
from kvtransfer.plan import Piece, Run, coalesce, extents, pieces, slices
from kvtransfer.transport import Extent, MemoryRegion, Region

NUM_REMOTE, NUM_LOCAL = 24, 20


@st.composite
def block_maps(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    local = draw(st.lists(st.integers(0, NUM_LOCAL - 1), unique=True, max_size=NUM_LOCAL))
    shift = draw(st.integers(0, 3))
    near = st.sampled_from([i + shift for i in local]) if local else st.nothing()
    anywhere = st.integers(0, NUM_REMOTE - 1)
    remote = [draw(st.one_of(st.just(i + shift), near, anywhere)) for i in local]
    return remote, local


def plan(remote: list[int], local: list[int]) -> list[Run]:
    return coalesce(remote, local, num_remote_blocks=NUM_REMOTE, num_local_blocks=NUM_LOCAL)


def whole_blocks(runs: list[Run], size: int) -> list[Extent]:
    return extents(runs, Piece(0, 0, 0, size), remote_stride=size, local_stride=size)


def pairs(runs: list[Run]) -> list[tuple[int, int]]:
    return [(r + i, d + i) for r, d, num in runs for i in range(num)]


@settings(max_examples=300)
@given(block_maps())
def test_every_block_exactly_once(block_map: tuple[list[int], list[int]]) -> None:
    remote, local = block_map
    assert sorted(pairs(plan(remote, local))) == sorted(zip(remote, local, strict=True))


@settings(max_examples=300)
@given(block_maps())
def test_merging_is_minimal(block_map: tuple[list[int], list[int]]) -> None:
    remote, local = block_map
    wanted = set(zip(remote, local, strict=True))
    # A run must begin at each pair without a predecessor on its diagonal, and nowhere else.
    starts = {(r, d) for r, d in wanted if (r - 1, d - 1) not in wanted}
    assert {(run.remote_id, run.local_id) for run in plan(remote, local)} == starts
    assert len(plan(remote, local)) == len(starts)


@settings(max_examples=200)
@given(block_maps(), st.integers(1, 7))
def test_slices_keep_all_blocks_within_the_bound(
    block_map: tuple[list[int], list[int]], max_blocks: int
) -> None:
    runs = plan(*block_map)
    batches = list(slices(runs, max_blocks))
    assert [pair for batch in batches for pair in pairs(batch)] == pairs(runs)
    sizes = [sum(run.num_blocks for run in batch) for batch in batches]
    assert all(size == max_blocks for size in sizes[:-1])
    assert all(0 < size <= max_blocks for size in sizes[-1:])


@settings(max_examples=200)
@given(block_maps(), st.sampled_from([8, 368_640]))
def test_extents_cover_every_byte_once(
    block_map: tuple[list[int], list[int]], item_bytes: int
) -> None:
    remote, local = block_map
    reads = sorted(whole_blocks(plan(remote, local), item_bytes), key=lambda e: e.local_offset)
    assert sum(read.num_bytes for read in reads) == len(local) * item_bytes
    for before, after in pairwise(reads):
        assert before.local_offset + before.num_bytes <= after.local_offset


def test_order_does_not_matter() -> None:
    assert plan([6, 4, 9, 5], [3, 1, 7, 2]) == plan([4, 5, 6, 9], [1, 2, 3, 7])
    assert whole_blocks(plan([6, 4, 5], [3, 1, 2]), 10) == [Extent(40, 10, 30)]


@pytest.mark.parametrize(
    ("remote", "local", "message"),
    [
        ([24], [0], "remote block id 24 "),
        ([-1], [0], "remote block id -1 "),
        ([0], [20], "local block id 20 "),
        ([0, 1], [5, 5], "local block id 5 "),
        ([0, 1], [5], "2 remote ids for 1 local ids"),
    ],
)
def test_bad_maps_are_named(remote: list[int], local: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(remote, local)


DRAFT = KVLayout(num_layers=2, num_kv_heads=4, head_dim=3, block_size=4, dtype="bfloat16")
TARGET = KVLayout(num_layers=3, num_kv_heads=8, head_dim=6, block_size=4, dtype="bfloat16")


def regions(layout: KVLayout, num_ranks: int) -> list[Region]:
    """The blocks of each rank."""
    parts = [layout.shard(rank, num_ranks) for rank in range(num_ranks)]
    return [
        Region("blocks", rank, "a.1", part.block_bytes, MemoryRegion(0, 0), part.groups)
        for rank, part in enumerate(parts)
    ]


def shards(layout: KVLayout, num_ranks: int, blocks: np.ndarray) -> list[np.ndarray]:
    """Each rank's part of whole blocks [num_blocks, block_bytes]; padding is 0."""
    found = []
    for region in regions(layout, num_ranks):
        part = np.zeros((len(blocks), region.stride), np.uint8)
        for whole, held in zip(layout.groups, region.groups, strict=True):
            source = whole.offset_of(held.first_head)
            size = held.num_heads * held.head_bytes
            part[:, held.offset : held.end] = blocks[:, source : source + size]
        found.append(part)
    return found


def layouts(num_heads: int) -> list[KVLayout]:
    """Of one model, and of one with a draft model of fewer and smaller heads."""
    alone = dataclasses.replace(TARGET, num_kv_heads=num_heads)
    draft = dataclasses.replace(DRAFT, num_kv_heads=max(1, num_heads // 2))
    return [alone, dataclasses.replace(alone, draft=draft)]


# Ranks of the remote worker and of the local one, and KV heads; the last have fewer than ranks.
RATIOS = [(1, 1, 8), (1, 2, 8), (2, 1, 8), (4, 8, 8), (8, 4, 8), (8, 8, 8), (4, 4, 8)]
FEW_HEADS = [(4, 8, 4), (8, 4, 4), (8, 8, 4), (8, 2, 2), (2, 8, 2), (4, 4, 1), (1, 8, 1)]


@pytest.mark.parametrize(("remote", "local", "heads"), RATIOS + FEW_HEADS)
def test_every_rank_gets_the_bytes_of_its_heads(remote: int, local: int, heads: int) -> None:
    """A plan carried out with real bytes, of scattered and adjacent blocks."""
    rng = np.random.default_rng(1)
    ids = [3, 4, 5, 9], [1, 2, 3, 0]
    runs = coalesce(*ids, num_remote_blocks=12, num_local_blocks=6)
    for layout in layouts(heads):
        blocks = rng.integers(1, 255, (12, layout.block_bytes), dtype=np.uint8)
        theirs, ours = regions(layout, remote), regions(layout, local)
        sources = shards(layout, remote, blocks)
        for region, expected in zip(ours, shards(layout, local, blocks), strict=True):
            got = np.zeros((6, region.stride), np.uint8)
            for piece in pieces(theirs, region):
                source, stride = sources[piece.region].reshape(-1), theirs[piece.region].stride
                for r, d, n in extents(
                    runs, piece, remote_stride=stride, local_stride=region.stride
                ):
                    got.reshape(-1)[d : d + n] = source[r : r + n]
            assert (got[ids[1]] == expected[ids[0]]).all()
            assert not np.delete(got, ids[1], axis=0).any(), "another block was written"


@pytest.mark.parametrize(("remote", "local", "heads"), RATIOS + FEW_HEADS)
def test_a_block_is_one_extent_a_remote_rank(remote: int, local: int, heads: int) -> None:
    """And group of layers; between workers that split alike adjacent blocks share one."""
    for layout in layouts(heads):
        for region in regions(layout, local):
            theirs = regions(layout, remote)
            found = pieces(theirs, region)
            if remote == local:
                assert found == [Piece(region.rank, 0, 0, region.stride)]
                continue
            num_groups = len(layout.groups)
            assert len(found) <= num_groups * max(1, remote // local)
            assert len({(p.region, p.remote_offset) for p in found}) == len(found)
            for piece in found:
                if piece.num_bytes < region.stride:
                    stride = theirs[piece.region].stride
                    reads = extents([Run(0, 0, 5)], piece, remote_stride=stride, local_stride=99)
                    assert [read.num_bytes for read in reads] == [piece.num_bytes] * 5


def test_ranks_that_hold_the_same_head_are_read_by_turns() -> None:
    layout = dataclasses.replace(TARGET, num_kv_heads=2)
    theirs = regions(layout, 4)
    read = Counter(p.region for region in regions(layout, 8) for p in pieces(theirs, region))
    assert read == {0: 2, 1: 2, 2: 2, 3: 2}


def test_a_peer_that_lacks_heads_is_refused() -> None:
    theirs, (ours,) = regions(TARGET, 4), regions(TARGET, 1)
    with pytest.raises(ValueError, match="KV head 2 of layer group 0 is on no rank"):
        pieces(theirs[:1] + theirs[2:], ours)
    other = dataclasses.replace(ours, groups=(LayerGroup(0, 8, 7, 0),))
    with pytest.raises(ValueError, match=r"heads of \[288\] bytes; expected \[7\]"):
        pieces(theirs, other)
    with pytest.raises(ValueError, match=r"heads of \[288, 96\] bytes; expected \[288\]"):
        pieces(regions(layouts(8)[1], 2), ours)
