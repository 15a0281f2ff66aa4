"""The seam between the step loop, or a drafter, and a model on its device.

    launch(rows) -> Pending       the work is queued on the device; the host goes on
    collect() -> StepOutput       the logits are there, and every KV write of the step is complete

A CPU computes in `launch`; its StepOutput is its own Pending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.attention.base import AttentionBackend
from engine.attention.batch import Row
from engine.cache.kv_cache import KVCache
from engine.kernels.threads import Threads
from engine.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The result of a step, row by row, valid until the runner's next launch."""

    logits: torch.Tensor  # fp32 [S, vocab], on the model's device
    hidden: torch.Tensor | None = None  # [S, hidden] before the output head; None: not kept

    def collect(self) -> StepOutput:
        """The output itself."""
        return self


class Pending(Protocol):
    """A step that was launched."""

    def collect(self) -> StepOutput:
        """Wait for the step. Its blocks may be hashed and sent from then on."""


class ModelRunner(Protocol):
    """Computes rows over the paged cache. Called from one thread, one step at a time."""

    def launch(self, rows: Sequence[Row]) -> Pending:
        """Start a step.

        Raises ValueError on a row that contradicts itself; nothing has been written then.
        """

    def run(self, rows: Sequence[Row]) -> torch.Tensor:
        """Launch and collect: the logits, fp32 [S, vocab]."""
        return self.launch(rows).collect().logits


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
