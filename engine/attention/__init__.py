"""Attention backends behind one contract (`base`); `select_backend` picks one."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from engine.attention.base import AttentionBackend
from engine.attention.torch_backend import TorchBackend
from engine.cache.layout import KVLayout


def select_backend(
    layout: KVLayout, num_heads: int, sliding_window: int, device: torch.device
) -> AttentionBackend[Any]:
    """FlashInfer on CUDA where it is installed and knows the precision; torch elsewhere."""
    if device.type == "cuda" and layout.dtype != "float32" and find_spec("flashinfer"):
        from engine.attention.flashinfer_backend import FlashInferBackend

        return FlashInferBackend(layout, num_heads, device, sliding_window)
    return TorchBackend(layout, num_heads, sliding_window)
