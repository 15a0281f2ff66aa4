"""What the requests of an engine hold at one moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.scheduling.block_pool import BlockPool
from engine.scheduling.request import Request


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


def holds_of(requests: Iterable[Request], pool: BlockPool, now_s: float) -> EngineHolds:
    """What these requests, all of an engine's, hold now."""
    held_by = [
        RequestHold(
            request_id=request.work.request_id,
            state=request.state.value,
            is_answer=request.is_answer,
            block_ids=tuple(request.table.blocks),
            age_s=now_s - request.arrival_s,
            left_s=None if (end := request.work.deadline_s) is None else end - now_s,
        )
        for request in requests
    ]
    return EngineHolds(tuple(held_by), pool.held, pool.num_free, pool.num_cached, pool.num_blocks)
