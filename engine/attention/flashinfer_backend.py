"""Attention on CUDA by FlashInfer's paged wrappers (HND, strided views).

The wrappers, `BatchPrefillWithPagedKVCacheWrapper` and `BatchDecodeWithPagedKVCacheWrapper`, keep
the result of `plan` in their workspaces. So a backend serves one plan at a time and checks that it
is the newest one; a draft model has a backend of its own.
"""

from __future__ import annotations

import importlib
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engine.attention.batch import Batch
from engine.attention.flashinfer_plan import PagedIndices, step_indices
from engine.base.errors import ConfigError
from engine.base.kv_layout import KVLayout
from engine.base.options import extend_path
from engine.cache.kv_cache import DTYPES, KVCache
from engine.models.config import FULL_ATTENTION, AttentionSpec

WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends
DECODE_KERNEL_GROUPS = (1, 2)  # wider GQA groups run faster, and odd ones only, on tensor cores


@dataclass(frozen=True, slots=True)
class FlashInferPlan:
    """Which tokens go to which kernel; the wrappers keep the other results of planning."""

    serial: int
    num_decode: int  # tokens of the decode kernel; the prefill kernel takes the others
    tokens: torch.Tensor | None  # [T]: decode's, then prefill's; None: already in that order
    order: torch.Tensor | None  # [T]: index of a token's output among those


def _arguments(part: PagedIndices) -> list[torch.Tensor]:
    """qo_indptr, kv_indptr, kv_indices, kv_last_page_len."""
    arrays = (part.qo_indptr, part.kv_indptr, part.kv_indices, part.kv_last_page_len)
    return [torch.from_numpy(array) for array in arrays]


def _package() -> Any:
    """flashinfer. It calls ninja by name, so the environment's scripts are added to PATH."""
    extend_path(sysconfig.get_path("scripts"))
    try:
        return importlib.import_module("flashinfer")
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: of other versions' parts
        raise ConfigError(
            f"flashinfer cannot be imported ({_line(str(error))}); install diptych[gpu] anew, or"
            " remove flashinfer-python: torch computes attention then"
        ) from error


@contextmanager
def _compiling() -> Iterator[None]:
    """Turn an error of loading or compiling a module into a ConfigError."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        text = str(error)
        words = ("Ninja build failed", "nvcc", "JIT")
        if not isinstance(error, OSError) and not any(word in text for word in words):
            raise
        raise ConfigError(
            f"flashinfer cannot compile its kernels ({_line(text)}); expected nvcc of CUDA"
            f" {torch.version.cuda}, g++ and ninja in the path, or its prebuilt modules, see"
            " docs/gpu.md; without flashinfer-python torch computes attention"
        ) from error


def _line(text: str) -> str:
    """The first of many lines that names an error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    errors = (line for line in lines if "error:" in line or "not found" in line)
    return next(errors, lines[0])[:300]


class FlashInferBackend:
    """AttentionBackend over FlashInfer, for fp16 and bf16."""

    def __init__(
        self,
        layout: KVLayout,
        num_heads: int,
        device: torch.device,
        spec: AttentionSpec = FULL_ATTENTION,
        workspace: torch.Tensor | None = None,
    ) -> None:
        """`workspace`: of another backend of the same stream; None: one of its own.

        Raises ConfigError for fp32, and where the package (extra `gpu`) cannot be imported.
        """
        if layout.dtype == "float32":
            raise ConfigError(
                "--dtype float32: FlashInfer has no fp32 kernels; use the torch backend"
            )
        flashinfer = _package()
        self._block_size = layout.block_size
        self._shape = (num_heads, layout.num_kv_heads, layout.head_dim, layout.block_size)
        self._options = {
            "window_left": spec.window - 1,  # keys before the query's own; -1: all
            "sm_scale": spec.scale or None,  # None: head_dim ** -0.5
            "logits_soft_cap": spec.softcap or None,
            "q_data_type": DTYPES[layout.dtype],
            "kv_data_type": DTYPES[layout.dtype],
        }
        self._device = device
        self._serial = 0
        # The float workspace is scratch of a single run, and runs follow one another on one stream.
        if workspace is None:
            workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.workspace = workspace
        group = num_heads // layout.num_kv_heads
        self._prefill: Any = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            workspace, "HND", backend="fa2"
        )
        self._decode: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=group not in DECODE_KERNEL_GROUPS, backend="fa2"
        )

    def plan(self, batch: Batch) -> FlashInferPlan:
        """Plan both kernels for this step, which makes the previous plan void.

        The first plan of a kind loads or compiles its module. Raises ConfigError where that fails.
        """
        step = step_indices(batch.rows, self._block_size)
        self._serial += 1
        with _compiling():
            if step.decode is not None:
                _, *pages = _arguments(step.decode)
                self._decode.plan(*pages, *self._shape, **self._options)
            if step.prefill is not None:
                pages = _arguments(step.prefill)
                self._prefill.plan(*pages, *self._shape, causal=True, **self._options)
        num_decode = 0 if step.decode is None else len(step.decode.tokens)
        if step.in_order:
            return FlashInferPlan(self._serial, num_decode, None, None)
        tokens, order = torch.from_numpy(np.stack([step.tokens, step.order])).to(self._device)
        return FlashInferPlan(self._serial, num_decode, tokens, order)

    def run(
        self,
        plan: FlashInferPlan,
        layer: int,
        q: torch.Tensor,
        kv_cache: KVCache,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of q [T, num_heads, head_dim] over layer `layer`; see AttentionBackend."""
        if sinks is not None:  # the choice of a backend leaves such models to torch
            raise ValueError("attention sinks are not computed by FlashInfer here")
        if plan.serial != self._serial:
            raise RuntimeError("this plan is void: the backend has planned another step since")
        kv = kv_cache.layer(layer)
        n = plan.num_decode
        if plan.tokens is not None:
            q = q.index_select(0, plan.tokens)
        # Without `out` the prefill wrapper allocates an output and zeroes it, in each layer.
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if n > 0:
            self._decode.run(q[:n], kv, out=out[:n])
        if n < len(q):
            self._prefill.run(q[n:], kv, out=out[n:])
        return out if plan.order is None else out.index_select(0, plan.order)
