"""Attention on the CPU by our own kernel: bfloat16 KV read once, where it lies, summed in fp32.

Steps in which every row has few queries (decode, verification of a draft) take it; a step with a
prompt chunk goes to the torch backend whole, whose matrix products win there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.attention.torch_backend import TorchBackend, TorchPlan
from engine.cache.kv_cache import KVCache
from engine.cache.layout import KVLayout
from engine.native import Kernels
from engine.runner.batch import Batch

MAX_QUERIES = 16  # of one row


@dataclass(frozen=True, slots=True)
class NativePlan:
    """A step of short rows: its own index arrays are all that the kernel needs."""

    batch: Batch


class NativeBackend:
    """Attention over the paged bfloat16 cache of `layout`; holds no state of a batch."""

    def __init__(
        self, layout: KVLayout, num_heads: int, sliding_window: int, library: Kernels
    ) -> None:
        self._torch = TorchBackend(layout, num_heads, sliding_window)
        self._group = num_heads // layout.num_kv_heads
        self._window = sliding_window
        self._library = library

    @staticmethod
    def takes(layout: KVLayout) -> bool:
        """Whether the kernel knows this precision and head size."""
        return layout.dtype == "bfloat16" and layout.head_dim % 32 == 0

    def plan(self, batch: Batch) -> NativePlan | TorchPlan:
        """The batch itself, or torch's plan where a row has many queries."""
        if max(len(row.token_ids) for row in batch.rows) > MAX_QUERIES:
            return self._torch.plan(batch)
        return NativePlan(batch)

    def run(
        self, plan: NativePlan | TorchPlan, layer: int, q: torch.Tensor, kv_cache: KVCache
    ) -> torch.Tensor:
        """Attention of q [T, num_heads, head_dim] over layer `layer`; see AttentionBackend."""
        if isinstance(plan, TorchPlan):
            return self._torch.run(plan, layer, q, kv_cache)
        batch = plan.batch
        return self._library.attention(
            kv_cache.pool[:, layer],
            batch.block_tables,
            batch.query_start,
            batch.context_lens,
            q.contiguous(),
            self._group,
            self._window,
        )
