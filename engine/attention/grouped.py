"""Attention of layers that differ: one backend and one plan for each group of equal layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.attention.base import AttentionBackend
from engine.attention.batch import Batch
from engine.cache.kv_cache import KVCache
from engine.models.config import AttentionSpec


class GroupedBackend:
    """AttentionBackend over those of the groups."""

    def __init__(
        self, specs: Sequence[AttentionSpec], make: Callable[[AttentionSpec], AttentionBackend[Any]]
    ) -> None:
        """`specs`: one a layer; `make` gives the backend of a group."""
        groups = list(dict.fromkeys(specs))
        self._group_of = [groups.index(spec) for spec in specs]
        self._backends = [make(spec) for spec in groups]

    def plan(self, batch: Batch) -> tuple[Any, ...]:
        """The plan of each group."""
        return tuple(backend.plan(batch) for backend in self._backends)

    def run(
        self,
        plan: tuple[Any, ...],
        layer: int,
        q: torch.Tensor,
        kv_cache: KVCache,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of q [T, num_heads, head_dim] over layer `layer`; see AttentionBackend."""
        group = self._group_of[layer]
        return self._backends[group].run(plan[group], layer, q, kv_cache, sinks)
