"""One forward pass over ragged rows: the only place where a step's work reaches the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from engine.attention.base import AttentionBackend
from engine.attention.batch import Row, build_batch
from engine.cache.kv_cache import KVCache
from engine.kernels.threads import Threads

if TYPE_CHECKING:
    from engine.runner.native_model import NativeModel
    from engine.runner.torch_model import TorchModel


def _event(device: torch.device) -> torch.Event | None:
    """What tells that a GPU has finished a step; the CPU has when the call returns."""
    return torch.Event(device) if device.type == "cuda" else None


class Runner:
    """A model, its cache and its attention. Called from one thread at a time."""

    def __init__(
        self, model: TorchModel, kv_cache: KVCache, backend: AttentionBackend[Any]
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._backend = backend
        self._done = _event(model.device)

    def over(self, kv_cache: KVCache) -> Runner:
        """The same model and workspaces over another pool of the same layout."""
        return Runner(self._model, kv_cache, self._backend)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> torch.Tensor:
        """The rows' wanted logits, row by row: fp32 [S, vocab] on the model's device.

        On return every KV write of the step is complete, so its blocks may be named and sent.
        Raises ValueError on a row that contradicts itself; nothing has been written then.
        """
        if not rows:
            size = (0, self._model.config.vocab_size)
            return torch.empty(size, dtype=torch.float32, device=self._model.device)
        batch = build_batch(rows, self._kv_cache.layout.block_size, self._model.device)
        logits = self._model.forward(batch, self._kv_cache, self._backend)
        if self._done is not None:
            self._done.record()
            self._done.synchronize()
        return logits


class NativeRunner:
    """A model computed by our own CPU kernels. Called from one thread at a time."""

    def __init__(self, model: NativeModel, kv_cache: KVCache, threads: Threads) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._threads = threads

    def over(self, kv_cache: KVCache) -> NativeRunner:
        """The same model over another pool of the same layout."""
        return NativeRunner(self._model, kv_cache, self._threads)

    def run(self, rows: Sequence[Row]) -> torch.Tensor:
        """The rows' wanted logits, row by row: fp32 [S, vocab], good until the next call.

        Raises ValueError on a row that contradicts itself, MemoryError.
        """
        if not rows:
            return torch.empty(0, self._model.config.vocab_size, dtype=torch.float32)
        self._threads.busy(True)
        try:
            return self._model.forward(rows, self._kv_cache)
        finally:
            self._threads.busy(False)
