"""How large the KV pool becomes, and the longest request that fits it. No torch here.

Pure functions of memory that is handed in. A pool on a host takes a modest part of a share that the
coordinator dealt, so that a worker that starts again has its predecessor's pool.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.cache.layout import KVLayout
from engine.errors import ConfigError
from engine.memory import HostMemory, shown

FLOOR_BYTES, MODEST_BYTES, MOST_BYTES = 64 << 20, 192 << 20, 1 << 30  # of a pool on a host


@dataclass(frozen=True, slots=True)
class PoolBudget:
    """Bytes for the pool; `limit` says what kept it from being larger, "" where nothing did."""

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
    wanted = min(max(MODEST_BYTES, 2 * longest_bytes), MOST_BYTES)
    available = memory.available_bytes
    fits = max(min(wanted, available // 4), min(longest_bytes, wanted, available // 2))
    if fits < wanted:
        return PoolBudget(max(FLOOR_BYTES, fits), memory.limit)
    if wanted < longest_bytes:
        return PoolBudget(wanted, f"the default's {shown(wanted)} (see --kv-cache-memory)")
    return PoolBudget(wanted)


def fit_pool(
    budget: PoolBudget, layout: KVLayout, *, longest: int, asked: int, draft_window: int
) -> PoolSize:
    """The pool of a budget for requests of `longest` tokens; shorter ones where it holds no more.

    `asked` is --max-model-len, which is not shortened; 0: unset. Raises ConfigError.
    """
    num_blocks = budget.num_bytes // layout.block_bytes
    fits = num_blocks * layout.block_size - draft_window
    least = asked or 2 * layout.block_size
    if fits < least:
        needed = layout.num_blocks(least + draft_window) * layout.block_bytes
        cause = f", limited by {budget.limit}" if budget.limit else ""
        raise ConfigError(
            f"the KV pool of {max(0, budget.num_bytes)} bytes{cause}: one request of {least} tokens"
            f" needs {needed} bytes; expected a larger --kv-cache-memory, or a smaller"
            " --max-model-len"
        )
    length = min(longest, fits)
    size = num_blocks * layout.block_bytes
    return PoolSize(num_blocks, length, size, budget.limit if length < longest else "")
