"""Our CPU attention beside torch's, in one process: `python -m benchmarks.kernels`.

    decode    one token over C positions, all layers of the default model: KV read, GB/s
    prefill   256 tokens after C - 256 others, one layer: ms, beside scaled_dot_product_attention in
              bfloat16 on gathered K and V (the gathering is not counted)

Both on one thread; medians of alternating repetitions, so a drift of the machine affects both.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from engine.base.kv_layout import KVLayout
from engine.cache.kv_cache import KVCache
from engine.kernels import kernels

LAYERS, KV_HEADS, GROUP, BLOCK, HEAD = 30, 3, 3, 16, 64
MAX_QUERIES = 96  # as in attention.h


class Geometry(ctypes.Structure):
    """One layer of the pool."""

    _fields_ = (
        ("layer", ctypes.c_void_p),
        ("block_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        *((x, ctypes.c_int) for x in ("kv_heads", "group", "head_dim", "block_size", "window")),
    )


class Queries(ctypes.Structure):
    """Some tokens of a request, for one K/V head."""

    _fields_ = (
        ("table", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        *((x, ctypes.c_int) for x in ("q_stride", "head", "num_tokens", "position")),
    )


class Paged:
    """A pool with one sequence of `context` positions, and our kernel over it."""

    def __init__(self, context: int) -> None:
        library = kernels()
        if library is None:
            sys.exit("no native kernels on this machine")
        self._attend = library.library.attend_all
        num_blocks = context // BLOCK
        layout = KVLayout(LAYERS, KV_HEADS, HEAD, BLOCK, "bfloat16")
        self.pool = KVCache(layout, num_blocks, torch.device("cpu")).pool.normal_()
        self.table = torch.randperm(num_blocks).int()
        self.q = torch.randn(256, KV_HEADS * GROUP, HEAD)
        size = 4 * MAX_QUERIES * (2 + HEAD)
        self._total, self._part = (ctypes.create_string_buffer(size) for _ in "ab")
        self._scratch = ctypes.create_string_buffer(4 * (2 * 64 * HEAD + 6 * 64) + 64)

    def run(self, layer: int, position: int, num_tokens: int) -> None:
        """Attention of the first tokens of `q`, the first of them at `position`."""
        strides = self.pool.stride()[:2]
        at = self.pool[0, 0, layer].data_ptr()
        geometry = Geometry(at, *strides, KV_HEADS, GROUP, HEAD, BLOCK, 0)
        width = KV_HEADS * GROUP * HEAD
        for first in range(0, num_tokens, (MAX_QUERIES // GROUP)):
            count = min((MAX_QUERIES // GROUP), num_tokens - first)
            for head in range(KV_HEADS):
                q = self.q[first, head * GROUP].data_ptr()
                work = Queries(self.table.data_ptr(), q, width, head, count, position + first)
                g, w = ctypes.byref(geometry), ctypes.byref(work)
                self._attend(g, w, None, 0, self._total, self._part, self._scratch)


def sdpa(paged: Paged, context: int) -> Callable[[], torch.Tensor]:
    """torch's attention of 256 tokens at the end of the context; heads of a group share K and V."""
    blocks = paged.pool[paged.table.long(), :, 0].permute(2, 1, 0, 3, 4)
    k, v = blocks.reshape(2, KV_HEADS, -1, HEAD)
    k, v = (x.repeat_interleave(GROUP, 0)[None].contiguous() for x in (k, v))
    q = paged.q.bfloat16().transpose(0, 1)[None].contiguous()
    rows = torch.arange(context - 256, context)[:, None]
    mask = (torch.arange(context)[None] <= rows).to(torch.bfloat16).log()
    return lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def alternate(*ways: Callable[[], object], repetitions: int = 15) -> list[float]:
    """Median seconds of each way, all of them in turn."""
    took: list[list[float]] = [[] for _ in ways]
    for _ in range(repetitions):
        for way, times in zip(ways, took, strict=True):
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in took]


def main() -> int:
    """Print one line of JSON a context."""
    torch.set_num_threads(1)
    for context in (512, 2048, 8192):
        paged = Paged(context)

        def decode(paged: Paged = paged, context: int = context) -> None:
            for layer in range(LAYERS):
                paged.run(layer, context - 1, 1)

        def prefill(paged: Paged = paged, context: int = context) -> None:
            paged.run(0, context - 256, 256)

        decode_s, ours_s, torch_s = alternate(decode, prefill, sdpa(paged, context))
        num_bytes = context * LAYERS * 2 * KV_HEADS * HEAD * 2
        line = {
            "context": context,
            "decode_ms": decode_s * 1e3,
            "decode_gb_s": num_bytes / decode_s / 1e9,
            "prefill_ms": ours_s * 1e3,
            "prefill_sdpa_ms": torch_s * 1e3,
            "prefill_ratio": torch_s / ours_s,
        }
        print(json.dumps({k: round(v, 2) for k, v in line.items()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
