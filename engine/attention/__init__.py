"""Attention backends behind one contract (`base`); `select_backend` picks one."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from engine.attention.base import AttentionBackend
from engine.attention.torch_backend import TorchBackend
from engine.cache.kv_cache import KVCache


def select_backend(kv_cache: KVCache, num_heads: int, sliding_window: int) -> AttentionBackend[Any]:
    """FlashInfer on CUDA where it is installed and knows the precision; torch elsewhere."""
    layout, device = kv_cache.layout, kv_cache.device
    if device.type == "cuda" and layout.dtype != "float32" and find_spec("flashinfer"):
        from engine.attention.flashinfer_backend import FlashInferBackend

        return FlashInferBackend(layout, num_heads, device, sliding_window)
    return TorchBackend(layout, num_heads, sliding_window, kv_cache.block_stride)
