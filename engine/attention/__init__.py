"""Attention backends behind one contract (`base`): one is chosen by name, then made.

FlashInfer computes on CUDA where it has kernels, torch in all other cases. The choice is part of
the numeric profile, so it is made before any weights are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from engine.attention.base import AttentionBackend
from engine.attention.grouped import GroupedBackend
from engine.attention.torch_backend import TorchBackend
from engine.base.kv_layout import KVLayout
from engine.cache.kv_cache import KVCache
from engine.models.config import AttentionSpec, ModelConfig

_HEAD_SIZES = (64, 128, 256)  # of flashinfer 0.7's paged fa2 kernels
_DTYPES = ("float16", "bfloat16")
_LEAST_ARCH = 80  # bfloat16 products, and the copies that its kernels are written with


@dataclass(frozen=True, slots=True)
class BackendChoice:
    """An attention backend, and the reason for it."""

    name: str  # flashinfer or torch
    version: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}-{self.version}" if self.version else self.name


def choose_backend(
    layout: KVLayout,
    num_heads: int,
    *,
    arch: str,
    flashinfer: str | None,
    sinks: bool = False,
) -> BackendChoice:
    """FlashInfer where it is installed and has kernels for the layout; else torch.

    `arch` is a GPU's, such as sm90; "": a CPU. `flashinfer` is the installed version, if any.
    `sinks`: the model has attention sinks.
    """
    if not arch:
        return BackendChoice("torch", "", "on a CPU")
    number = arch.removeprefix("sm")
    lacks = ""
    if flashinfer is None:
        lacks = "flashinfer is not installed (install diptych[gpu])"
    elif sinks:
        lacks = "the model has attention sinks"
    elif layout.dtype not in _DTYPES:
        lacks = f"flashinfer has no {layout.dtype} kernels"
    elif layout.head_dim not in _HEAD_SIZES:
        known = ", ".join(map(str, _HEAD_SIZES))
        lacks = f"flashinfer has no kernels for heads of {layout.head_dim}, but of {known}"
    elif num_heads % layout.num_kv_heads:
        lacks = f"{num_heads} heads are no multiple of {layout.num_kv_heads} KV heads"
    elif not number.isdecimal() or int(number) < _LEAST_ARCH:
        lacks = f"flashinfer needs sm{_LEAST_ARCH} or later, this GPU is {arch}"
    if lacks or flashinfer is None:
        return BackendChoice("torch", torch.__version__.partition("+")[0], lacks)
    return BackendChoice("flashinfer", flashinfer, f"kernels for heads of {layout.head_dim}")


def flashinfer_version() -> str | None:
    """The version of the installed package; None without one."""
    try:
        return version("flashinfer-python")
    except PackageNotFoundError:
        return None


def make_backend(
    choice: BackendChoice, kv_cache: KVCache, config: ModelConfig
) -> AttentionBackend[Any]:
    """The backend of a choice. Raises ConfigError where FlashInfer is broken."""
    layout = kv_cache.layout
    shared: list[torch.Tensor] = []  # the workspace of all groups, which run one after the other

    def make(spec: AttentionSpec) -> AttentionBackend[Any]:
        if choice.name == "flashinfer":
            from engine.attention.flashinfer_backend import FlashInferBackend

            place = (kv_cache.device, spec, shared[0] if shared else None)
            backend = FlashInferBackend(layout, config.num_heads, *place)
            shared[:] = [backend.workspace]
            return backend
        return TorchBackend(layout, config.num_heads, spec, kv_cache.block_stride)

    specs = config.attention
    if len(set(specs)) == 1 and layout.num_columns == 1:
        return make(specs[0])
    return GroupedBackend(specs, make, [layout.place(i)[0] for i in range(len(specs))])
