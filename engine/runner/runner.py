"""One forward pass over ragged rows: the only place where a step's work reaches the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from engine.attention.base import AttentionBackend
from engine.attention.batch import BatchBuilder, Row
from engine.cache.kv_cache import KVCache
from engine.kernels.threads import Threads
from engine.runner.base import ModelRunner, Pending, StepOutput

if TYPE_CHECKING:
    from engine.runner.native_model import NativeModel
    from engine.runner.torch_model import TorchModel


def _event(device: torch.device) -> torch.Event | None:
    """Marks the end of a step on a GPU; a CPU has finished when the call returns."""
    return torch.Event(device) if device.type == "cuda" else None


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step on a GPU, complete when its event is."""

    output: StepOutput
    done: torch.Event

    def collect(self) -> StepOutput:
        self.done.synchronize()
        return self.output


class Runner(ModelRunner):
    """A model, its cache and its attention. Called from one thread at a time."""

    def __init__(
        self, model: TorchModel, kv_cache: KVCache, backend: AttentionBackend[Any]
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._backend = backend
        layout = kv_cache.layout
        self._batches = BatchBuilder(layout.block_size, model.device, layout.num_columns)
        self._done = _event(model.device)

    def over(self, kv_cache: KVCache) -> Runner:
        """The same model and workspaces over another pool of the same layout."""
        return Runner(self._model, kv_cache, self._backend)

    @torch.inference_mode()
    def launch(self, rows: Sequence[Row]) -> Pending:
        """Plan attention and start the forward pass; see ModelRunner."""
        if not rows:
            size = (0, self._model.config.vocab_size)
            return StepOutput(torch.empty(size, dtype=torch.float32, device=self._model.device))
        batch = self._batches.build(rows)
        plan = self._backend.plan(batch)
        output = StepOutput(self._model.forward(batch, plan, self._kv_cache, self._backend))
        if self._done is None:
            return output
        self._done.record()
        return _Launched(output, self._done)


class NativeRunner(ModelRunner):
    """A model computed by our own CPU kernels. Its logits are valid until the next launch."""

    def __init__(self, model: NativeModel, kv_cache: KVCache, threads: Threads) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._threads = threads

    def over(self, kv_cache: KVCache) -> NativeRunner:
        """The same model over another pool of the same layout."""
        return NativeRunner(self._model, kv_cache, self._threads)

    def launch(self, rows: Sequence[Row]) -> Pending:
        """Compute the rows; see ModelRunner. Raises MemoryError, too."""
        if not rows:
            return StepOutput(torch.empty(0, self._model.config.vocab_size, dtype=torch.float32))
        self._threads.busy(True)
        try:
            return StepOutput(self._model.forward(rows, self._kv_cache))
        finally:
            self._threads.busy(False)
