"""The size of the KV pool, and the longest request that fits it. No torch here.

Pure functions of measured memory. A pool on a host takes a modest part of the share that the
coordinator assigned, so that a restarted worker gets a pool of the same size. A pool on a GPU is
allocated last:

    | CUDA's own | weights | activations of the largest step, workspaces | KV pool |    unused    |
    0            '------------- reserved by torch -------------'         utilization          total
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.base.errors import ConfigError
from engine.base.kv_columns import longest_text
from engine.base.kv_layout import KVLayout
from engine.base.memory import HostMemory, readable_size

FLOOR_BYTES, MODEST_BYTES, MOST_BYTES = 64 << 20, 192 << 20, 1 << 30  # of a pool on a host


@dataclass(frozen=True, slots=True)
class PoolBudget:
    """Bytes for the pool; `limit` names what keeps it from being larger, "" for nothing."""

    num_bytes: int
    limit: str = ""


@dataclass(frozen=True, slots=True)
class PoolSize:
    """A pool that holds one request of `max_model_len` tokens at least."""

    num_blocks: int
    max_model_len: int
    num_bytes: int
    limit: str


def host_budget(longest_bytes: int, memory: HostMemory) -> PoolBudget:
    """Two requests of full length, or what is modest; at most a quarter of the memory there is.

    One request of full length may take half of it. Never less than a floor.
    """
    modest = min(max(MODEST_BYTES, 2 * longest_bytes), MOST_BYTES)
    available = memory.available_bytes
    fits = max(min(modest, available // 4), min(longest_bytes, modest, available // 2))
    if fits < modest:
        return PoolBudget(max(FLOOR_BYTES, fits), memory.limit)
    if modest < longest_bytes:
        return PoolBudget(modest, f"the default's {readable_size(modest)} (see --kv-cache-memory)")
    return PoolBudget(modest)


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """A GPU at one moment; `reserved_bytes` is what this process's torch holds of it."""

    total_bytes: int
    free_bytes: int
    reserved_bytes: int


# An allowance for what the driver counts to this process beside torch: the context, loaded kernels,
# cuBLAS. It cannot be measured while another process uses the GPU.
CONTEXT_BYTES = 768 << 20


def gpu_budget(memory: GpuMemory, utilization: float) -> PoolBudget:
    """The rest of the worker's part of a GPU after weights, activations and workspaces.

    Never more than is free, less the share that stays unused.
    """
    total, taken = memory.total_bytes, memory.reserved_bytes + CONTEXT_BYTES
    part = int(total * utilization) - taken
    free = memory.free_bytes - min(CONTEXT_BYTES, int(total * (1 - utilization)))
    if free < part:
        limit = (
            f"the {readable_size(memory.free_bytes)} that are free of the GPU's"
            f" {readable_size(total)}"
        )
        return PoolBudget(max(0, free), f"{limit}: other processes use it too")
    limit = (
        f"--gpu-memory-utilization {utilization:g} of the GPU's {readable_size(total)}, of which"
        f" weights, activations and workspaces take {readable_size(taken)}"
    )
    return PoolBudget(max(0, part), limit)


def fit_pool(
    budget: PoolBudget,
    layout: KVLayout,
    *,
    longest: int,
    requested: int,
    draft_window: int,
    ahead: int = 0,
) -> PoolSize:
    """The pool of a budget for requests of `longest` tokens, or of fewer if it holds no more.

    `requested` is --max-model-len, which is not shortened; 0: unset. `ahead` as kv_columns has it.
    Raises ConfigError.
    """
    num_blocks = budget.num_bytes // layout.block_bytes
    fits = longest_text(layout.windows, num_blocks, layout.block_size, ahead) - draft_window
    least = requested or 2 * layout.block_size
    if fits < least:
        needed = layout.pool_blocks(least + draft_window, ahead) * layout.block_bytes
        cause = f", limited by {budget.limit}" if budget.limit else ""
        raise ConfigError(
            f"the KV pool of {max(0, budget.num_bytes)} bytes{cause}: one request of {least} tokens"
            f" needs {needed} bytes; expected more memory for it, or a smaller --max-model-len"
        )
    length = min(longest, fits)
    size = num_blocks * layout.block_bytes
    return PoolSize(num_blocks, length, size, budget.limit if length < longest else "")
