from __future__ import annotations

import ctypes
import dataclasses
import itertools
import mmap
from collections import Counter

import pytest
import torch

from engine.base.kv_layout import KVLayout
from engine.cache.kv_cache import KVCache

CPU = torch.device("cpu")
LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32")


def test_the_pool_is_zero_aligned_and_as_large_as_its_blocks() -> None:
    cache = KVCache(LAYOUT, 7, CPU)
    assert cache.pool.shape == (7, 2, 3, 2, 4, 4)
    assert cache.pool.is_contiguous() and not cache.pool.any()
    assert cache.address % mmap.PAGESIZE == 0 and cache.address == cache.pool.data_ptr()
    assert cache.num_bytes == 7 * LAYOUT.block_bytes == cache.pool.nbytes
    assert (cache.kind, cache.device_id) == ("DRAM", 0)


def test_a_block_is_one_extent_at_address_plus_block_bytes() -> None:
    cache = KVCache(LAYOUT, 5, CPU)
    cache.pool[3] = 1.5
    start = cache.address + 3 * LAYOUT.block_bytes
    raw = ctypes.string_at(start, LAYOUT.block_bytes)
    assert torch.frombuffer(bytearray(raw), dtype=torch.float32).eq(1.5).all()
    assert cache.pool.eq(1.5).sum() == LAYOUT.block_bytes // 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_write_puts_each_token_at_its_slot_and_touches_nothing_else(dtype: str) -> None:
    layout = KVLayout(3, 2, 4, 4, dtype)
    cache = KVCache(layout, 6, CPU)
    torch.manual_seed(0)
    slots = torch.tensor([21, 0, 7, 6])
    k = torch.randn(4, 2, 4).to(cache.pool.dtype)
    v = torch.randn(4, 2, 4).to(cache.pool.dtype)
    cache.write(1, slots // 4, slots % 4, k, v)
    k_blocks, v_blocks = cache.layer(1)
    for i, slot in enumerate(slots.tolist()):
        block, offset = divmod(slot, 4)
        assert torch.equal(k_blocks[block, :, offset], k[i])
        assert torch.equal(v_blocks[block, :, offset], v[i])
    assert cache.pool.count_nonzero() == k.count_nonzero() + v.count_nonzero()
    assert not cache.pool[:, :, [0, 2]].any()


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        KVCache(LAYOUT, 0, CPU)


@pytest.mark.parametrize("draft_dim", [4, 6, 16])
def test_a_draft_models_layers_lie_behind_the_targets_in_every_block(draft_dim: int) -> None:
    draft = KVLayout(2, 1, draft_dim, 4, "float32")
    layout = dataclasses.replace(LAYOUT, draft=draft)
    cache = KVCache(layout, 5, CPU)
    assert cache.draft is not None and cache.draft.draft is None
    assert cache.num_bytes == 5 * layout.block_bytes == cache.draft.num_bytes
    assert cache.draft.pool.shape == (5, *draft.block_shape)
    cache.pool.fill_(1.0)
    cache.draft.pool.fill_(2.0)
    block = ctypes.string_at(cache.address + 3 * layout.block_bytes, layout.block_bytes)
    values = torch.frombuffer(bytearray(block), dtype=torch.float32)
    size, offset = 3 * 2 * 2 * 4 * 4, layout.draft_offset
    assert values[:size].eq(1.0).all() and not values[size:offset].any()
    assert values[offset : offset + draft.block_elements].eq(2.0).all()
    for view in (cache, cache.draft):  # a head's keys in a block are a run
        view.pool[3, -1, 1, 0] = 3.0
        run = view.layout.run_elements
        assert view.block_stride % run == 0
        last_head = (view.layout.num_kv_heads - 1) * 2 * view.layout.num_layers
        index = 3 * view.block_stride // run + last_head + 2
        assert view.runs[index].eq(3.0).all() and view.runs.eq(3.0).sum() == run
        view.pool[3, -1, 1, 0] = 0.0


@pytest.mark.parametrize("draft_dim", [4, 6])
def test_any_range_of_heads_of_a_block_is_one_extent(draft_dim: int) -> None:
    """Of the target and of the draft model, whose heads differ in number and size."""
    draft = KVLayout(2, 3, draft_dim, 4, "float32")
    layout = dataclasses.replace(LAYOUT, num_kv_heads=4, draft=draft)
    cache = KVCache(layout, 5, CPU)
    assert cache.draft is not None
    raw = torch.frombuffer(cache.read_block(2), dtype=torch.uint8)
    for view, group in zip((cache, cache.draft), layout.groups, strict=True):
        assert group.num_heads == view.layout.num_kv_heads
        for first, end in itertools.combinations(range(group.num_heads + 1), 2):
            cache._memory.zero_()
            view.pool[2, first:end] = 1.5
            start, stop = (group.offset + head * group.head_bytes for head in (first, end))
            assert raw[start:stop].view(torch.float32).eq(1.5).all()
            assert cache._memory.count_nonzero() == (stop - start) // 4
    assert layout.groups[0].end <= layout.groups[1].offset
    assert layout.groups[1].end <= layout.block_bytes


def test_a_layer_is_a_strided_view_without_a_copy() -> None:
    cache = KVCache(LAYOUT, 5, CPU)
    k, v = cache.layer(2)
    assert k.shape == v.shape == (5, 2, 4, 4) and k.stride() == v.stride() == (192, 96, 4, 1)
    k[3, 1, 2] = 5.0
    v[3, 1, 2] = 7.0
    assert cache.pool[3, 1, 2, :, 2].tolist() == [[5.0] * 4, [7.0] * 4]


@pytest.mark.parametrize(("heads", "ranks"), [(8, 1), (8, 4), (8, 8), (2, 4), (1, 4)])
def test_ranks_hold_all_heads_and_each_equally_often(heads: int, ranks: int) -> None:
    layout = dataclasses.replace(LAYOUT, num_kv_heads=heads)
    held = []
    for rank in range(ranks):
        (group,) = layout.shard(rank, ranks).groups
        held += range(group.first_head, group.first_head + group.num_heads)
    assert held == sorted(held)
    assert set(Counter(held).values()) == {max(1, ranks // heads)} and set(held) == {*range(heads)}


@pytest.mark.parametrize(("rank", "ranks"), [(0, 3), (2, 2), (-1, 2)])
def test_a_rank_that_cannot_be_is_refused(rank: int, ranks: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {ranks} over 2 KV heads"):
        LAYOUT.shard(rank, ranks)


def test_two_models_without_a_gap_need_no_padding() -> None:
    draft = KVLayout(8, 3, 64, 16, "bfloat16")
    layout = KVLayout(30, 3, 64, 16, "bfloat16", draft)
    assert layout.block_bytes == 368_640 * 38 // 30
    with pytest.raises(ValueError, match="block_size"):
        KVLayout(30, 3, 64, 32, "bfloat16", draft)
