"""What this machine can do: `python -m benchmarks.limits` prints it as JSON.

Reading memory with one thread and with all, from a buffer as large as the model's packed weights
(which a large cache may hold) and from one that no cache holds; and bf16 products of several
heights, in the shape of the default model's widest matrix. The best of several tries counts: other
work on the machine only ever slows one down.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

READ_SIZES = {"98MB": 98 << 20, "1GiB": 1 << 30}
HEIGHTS = (1, 8, 64, 512)
_SHAPE = (576, 1536)
_NUM_MATRICES = 64  # products go through as many, so that weights come from where a model's do
_TRIES = 7


@dataclass(frozen=True, slots=True)
class ModelCost:
    """What one step of a model must read and compute."""

    weight_bytes: int
    num_params: int
    kv_bytes_per_token: int


def floor_ms(cost: ModelCost, limits: Mapping[str, Any], batch: int, context: int) -> float:
    """Least time of one decode step: its bytes or its FLOPs, whichever takes longer.

    The rate of FLOPs is the best height's: a product of one row is bound by bytes, counted apart.
    """
    num_bytes = cost.weight_bytes + batch * context * cost.kv_bytes_per_token
    flops = 2.0 * cost.num_params * batch
    read, rate = best_read_gb_s(limits), max(limits["gemm_gflops"].values())
    return max(num_bytes / (read * 1e9), flops / (rate * 1e9)) * 1000


def best_read_gb_s(limits: Mapping[str, Any]) -> float:
    """With all threads, from a buffer as large as the weights."""
    by_threads = limits["read_gb_s"]["98MB"]
    return float(max(by_threads.values()))


def measure() -> dict[str, Any]:
    """All limits; takes some seconds."""
    import torch

    num_threads = os.cpu_count() or 1
    counts = sorted({1, num_threads})
    reads: dict[str, dict[str, float]] = {}
    for name, size in READ_SIZES.items():
        buffer = torch.ones(size // 4, dtype=torch.float32)
        reads[name] = {}
        for count in counts:
            torch.set_num_threads(count)
            seconds = min(_time(buffer.sum), _time(buffer.max))
            reads[name][str(count)] = round(size / seconds / 1e9, 2)
        del buffer
    torch.set_num_threads(num_threads)
    return {"num_threads": num_threads, "read_gb_s": reads, "gemm_gflops": _gemm()}


def _gemm() -> dict[str, float]:
    import torch

    rows, cols = _SHAPE
    weights = [torch.randn(cols, rows).to(torch.bfloat16) for _ in range(_NUM_MATRICES)]
    rates = {}
    for height in HEIGHTS:
        x = torch.randn(height, rows).to(torch.bfloat16)

        def run(x: Any = x) -> None:
            for weight in weights:
                torch.nn.functional.linear(x, weight)

        seconds = _time(run) / _NUM_MATRICES
        rates[str(height)] = round(2.0 * height * rows * cols / seconds / 1e9, 1)
    return rates


def _time(work: Callable[[], Any]) -> float:
    work()
    best = float("inf")
    for _ in range(_TRIES):
        begin = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begin)
    return best


if __name__ == "__main__":
    print(json.dumps(measure()))
