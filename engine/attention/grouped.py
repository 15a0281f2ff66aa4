"""Attention of layers that differ: one backend and one plan for each group of equal layers.

Equal are layers with one AttentionSpec in one column of the block tables.
"""

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
        self,
        specs: Sequence[AttentionSpec],
        make: Callable[[AttentionSpec], AttentionBackend[Any]],
        columns: Sequence[int] = (),
    ) -> None:
        """`specs`, `columns`: one a layer, ()= all in column 0; `make` gives a group's backend."""
        layers = list(zip(specs, columns or [0] * len(specs), strict=True))
        groups = list(dict.fromkeys(layers))
        self._group_of = [groups.index(each) for each in layers]
        self._columns = [column for _, column in groups]
        self._backends = [make(spec) for spec, _ in groups]

    def plan(self, batch: Batch) -> tuple[Any, ...]:
        """The plan of each group."""
        return tuple(
            backend.plan(batch.column(column))
            for backend, column in zip(self._backends, self._columns, strict=True)
        )

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
