"""The seam between the model and an attention implementation: plan once a step, run once a layer.

A backend may own workspaces, but only the plan depends on the batch, so that a draft model can run
beside the target with its own plan.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

from engine.attention.batch import Batch
from engine.cache.kv_cache import KVCache

P = TypeVar("P")


class AttentionBackend(Protocol[P]):
    """Causal attention of a step's tokens over their rows' cached context; P: its kind of plan."""

    def plan(self, batch: Batch) -> P:
        """Compute what depends on the batch and not on the layer."""

    def run(
        self,
        plan: P,
        layer: int,
        q: torch.Tensor,
        kv_cache: KVCache,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of q [T, num_heads, head_dim], scaled by head_dim ** -0.5; same shape, dtype.

        sinks: one more score for each head [num_heads], which takes a share and has no value.

        The K and V of the step's tokens are in the cache already. Query head h reads K/V head
        h // (num_heads // num_kv_heads). Unused positions of a block never affect the result.
        """
