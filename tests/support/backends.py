"""Attention backends and batches for tests of a cache alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from engine.attention import choose_backend, flashinfer_version, make_backend
from engine.attention.base import AttentionBackend
from engine.attention.batch import Batch, BatchBuilder, Row
from engine.cache.kv_cache import KVCache
from engine.models.config import ModelConfig


def select_backend(kv_cache: KVCache, config: ModelConfig) -> AttentionBackend[Any]:
    """The backend that suits the cache's device."""
    arch = ""
    if kv_cache.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(kv_cache.device)
        arch = f"sm{major}{minor}"
    found = flashinfer_version()
    sinks = config.attention_sinks
    choice = choose_backend(
        kv_cache.layout, config.num_heads, arch=arch, flashinfer=found, sinks=sinks
    )
    return make_backend(choice, kv_cache, config)


def build_batch(rows: Sequence[Row], block_size: int, device: torch.device) -> Batch:
    """Lay `rows` out on `device` once."""
    return BatchBuilder(block_size, device).build(rows)
