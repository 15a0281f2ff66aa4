"""Planning: every byte once, as few reads as there can be, nothing out of bounds."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.plan import Run, coalesce, extents, slices
from kvtransfer.transport import Extent

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
    reads = sorted(extents(plan(remote, local), item_bytes), key=lambda e: e.local_offset)
    assert sum(read.num_bytes for read in reads) == len(local) * item_bytes
    for before, after in pairwise(reads):
        assert before.local_offset + before.num_bytes <= after.local_offset


def test_order_does_not_matter() -> None:
    assert plan([6, 4, 9, 5], [3, 1, 7, 2]) == plan([4, 5, 6, 9], [1, 2, 3, 7])
    assert extents(plan([6, 4, 5], [3, 1, 2]), 10) == [Extent(40, 10, 30)]


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
