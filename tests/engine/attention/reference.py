"""Attention one query and one head at a time, in float64, from the block tables: slow and plain."""

from __future__ import annotations

import numpy as np
import torch

from engine.cache.kv_cache import KVCache
from engine.runner.batch import Row


def reference_attention(
    rows: list[Row], layer: int, q: torch.Tensor, kv_cache: KVCache, window: int = 0
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
            for head in range(q.shape[1]):
                k = k_blocks[block, head // group, offset].double().numpy()
                v = v_blocks[block, head // group, offset].double().numpy()
                score = k @ q[token, head].double().numpy() * layout.head_dim**-0.5
                weight = np.exp(score - score.max())
                out[token, head] = torch.from_numpy(weight @ v / weight.sum())
            token += 1
    return out
