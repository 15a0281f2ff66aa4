"""Attention one query at a time, in float64: slow, plain; and batches to try it on."""

from __future__ import annotations

import random

import torch

from engine.attention.batch import Row
from engine.base.kv_layout import KVLayout
from engine.cache.kv_cache import KVCache

CPU = torch.device("cpu")
HEADS = 6
KV_HEADS = 2

# (start, tokens) of each row
CASES = {
    "one decode": [(0, 1)],
    "decodes of one length": [(7, 1), (7, 1), (7, 1)],
    "decodes of many lengths": [(0, 1), (3, 1), (4, 1), (63, 1), (200, 1), (9, 1)],
    "verify": [(12, 5), (9, 2), (30, 1), (14, 4)],
    "a whole prompt": [(0, 50)],
    "chunks": [(0, 40), (37, 41), (5, 32)],
    "everything": [(11, 1), (0, 33), (20, 3), (0, 2), (64, 1), (29, 45), (3, 31)],
}


def poisoned(
    shapes: list[tuple[int, int]],
    *,
    block_size: int = 4,
    dtype: str = "float32",
    head_dim: int = 8,
    device: torch.device = CPU,
) -> tuple[list[Row], KVCache]:
    """Rows of (start, tokens) over scattered blocks; every position that no row holds is NaN."""
    rng = random.Random(0)
    torch.manual_seed(0)
    layout = KVLayout(2, KV_HEADS, head_dim, block_size, dtype)
    sizes = [layout.num_blocks(start + count) for start, count in shapes]
    cache = KVCache(layout, sum(sizes) + 3, device)
    cache.pool.fill_(float("nan"))
    free = list(range(cache.num_blocks))
    rng.shuffle(free)
    rows = []
    for (start, count), size in zip(shapes, sizes, strict=True):
        block_ids = [free.pop() for _ in range(size)]
        rows.append(Row([0] * count, start, [*block_ids, free[0]], 0))
        for p in range(start + count):
            block, offset = block_ids[p // block_size], p % block_size
            cache.pool[block, :, :, :, offset] = torch.randn(KV_HEADS, 2, 2, head_dim).to(
                cache.pool
            )
    return rows, cache


def queries(rows: list[Row], cache: KVCache, num_heads: int = HEADS) -> torch.Tensor:
    """Random q [T, num_heads, head_dim] of the cache's dtype and device."""
    torch.manual_seed(99)
    num_tokens = sum(len(row.token_ids) for row in rows)
    return torch.randn(num_tokens, num_heads, cache.layout.head_dim).to(cache.pool)


def reference_attention(
    rows: list[Row],
    layer: int,
    q: torch.Tensor,
    kv_cache: KVCache,
    window: int = 0,
    scale: float = 0.0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """[T, num_heads, head_dim] for q of the same shape."""
    layout = kv_cache.layout
    group = q.shape[1] // layout.num_kv_heads
    k_blocks, v_blocks = kv_cache.layer(layer)
    out = torch.empty(q.shape, dtype=torch.float64)
    token = 0
    for row in rows:
        for i in range(len(row.token_ids)):
            last = row.start + i
            seen = range(max(0, last - window + 1) if window else 0, last + 1)
            block = [row.block_ids[p // layout.block_size] for p in seen]
            offset = [p % layout.block_size for p in seen]
            # [seen, num_heads, head_dim]
            k = k_blocks[block, :, offset].double().repeat_interleave(group, 1)
            v = v_blocks[block, :, offset].double().repeat_interleave(group, 1)
            score = (k * q[token].double()).sum(-1) * (scale or layout.head_dim**-0.5)
            score = softcap * torch.tanh(score / softcap) if softcap else score
            out[token] = (score.softmax(0)[..., None] * v).sum(0)
            token += 1
    return out
