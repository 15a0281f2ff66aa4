from __future__ import annotations

import ctypes
import dataclasses

import pytest
import torch

from engine.base.kv_layout import KVLayout
from engine.cache.kv_cache import PAGE_BYTES, KVCache

CPU = torch.device("cpu")
LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32")


def test_the_pool_is_zero_aligned_and_as_large_as_its_blocks() -> None:
    cache = KVCache(LAYOUT, 7, CPU)
    assert cache.pool.shape == (7, 3, 2, 2, 4, 4)
    assert cache.pool.is_contiguous() and not cache.pool.any()
    assert cache.address % PAGE_BYTES == 0 and cache.address == cache.pool.data_ptr()
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
    assert not cache.pool[:, [0, 2]].any()


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
        view.pool[3, 1, 0, 0] = 3.0
        run = view.layout.run_elements
        assert view.block_stride % run == 0
        index = 3 * view.block_stride // run + 2 * view.layout.num_kv_heads
        assert view.runs[index].eq(3.0).all() and view.runs.eq(3.0).sum() == run
        view.pool[3, 1, 0, 0] = 0.0


def test_two_models_without_a_gap_need_no_padding() -> None:
    draft = KVLayout(8, 3, 64, 16, "bfloat16")
    layout = KVLayout(30, 3, 64, 16, "bfloat16", draft)
    assert layout.block_bytes == 368_640 * 38 // 30
    with pytest.raises(ValueError, match="block_size"):
        KVLayout(30, 3, 64, 32, "bfloat16", draft)
