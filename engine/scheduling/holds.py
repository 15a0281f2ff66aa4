"""What the requests of an engine hold at one moment."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestHold:
    """One request that has not ended. While it waits it holds no block."""

    request_id: str
    state: str
    is_answer: bool  # else it computes only the KV of whole blocks
    block_ids: tuple[int, ...]
    age_s: float
    left_s: float | None  # until its caller stops waiting; None: the caller gave no deadline


@dataclass(frozen=True, slots=True)
class EngineHolds:
    """All requests, and the pool: `held` are the blocks with a reference."""

    requests: tuple[RequestHold, ...]
    held: frozenset[int]
    num_free: int
    num_cached: int
    num_blocks: int
