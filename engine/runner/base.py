"""The seam between the step loop, or a drafter, and a model on its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from engine.attention.base import AttentionBackend
from engine.attention.batch import Row
from engine.cache.kv_cache import KVCache
from engine.kernels.threads import Threads
from engine.models.config import ModelConfig


class ModelRunner(Protocol):
    """Computes rows over the paged cache. Called from one thread, one step at a time."""

    def run(self, rows: Sequence[Row]) -> torch.Tensor:
        """The logits of a step, row by row: fp32 [S, vocab], on the device, valid until the next.

        All KV of the step is written then: its blocks may be hashed and sent. Raises ValueError on
        a row that contradicts itself; nothing has been written then.
        """


class PooledRunner(ModelRunner, Protocol):
    """A runner whose pool can be exchanged."""

    def over(self, kv_cache: KVCache) -> PooledRunner:
        """The same model and workspaces over another pool of the same layout."""


class Host(Protocol):
    """What models share on a worker's device."""

    def attention(self, config: ModelConfig, kv_cache: KVCache) -> AttentionBackend[Any]:
        """Attention of a model over its cache."""

    def threads(self) -> Threads:
        """The threads of our own kernels."""


class Model(Protocol):
    """A model with its weights, whatever computes it."""

    config: ModelConfig

    @property
    def exact(self) -> bool:
        """Whether a token's logits are the same bits whatever else is in a step."""

    def first_layers(self, num_layers: int) -> Model:
        """This model without its later layers. Raises ValueError."""

    def make_runner(self, kv_cache: KVCache, host: Host) -> PooledRunner:
        """What computes the model over `kv_cache`."""
