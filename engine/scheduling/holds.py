"""What the requests of an engine hold at one moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.base.holds import NO_DEADLINE, Hold
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.request import Request, State

_STATES = {
    State.WAITING: "waits for memory or for blocks of another request: holds none",
    State.FETCHING: "its prompt's blocks are being pulled from a prefill worker",
    State.RUNNING: "is being computed",
}


@dataclass(frozen=True, slots=True)
class EngineHolds:
    """All requests, and the pool: `held` are the blocks with a reference."""

    requests: tuple[Hold, ...]
    held: frozenset[int]
    num_free: int
    num_cached: int
    num_blocks: int


def holds_of(requests: Iterable[Request], pool: BlockPool, now_s: float) -> EngineHolds:
    """What these requests, all of an engine's, hold now."""
    holds = tuple(_hold_of(request, now_s) for request in requests)
    return EngineHolds(holds, pool.held, pool.num_free, pool.num_cached, pool.num_blocks)


def _hold_of(request: Request, now_s: float) -> Hold:
    what, end_s = "answer" if request.is_answer else "prompt", request.work.deadline_s
    return Hold(
        kind="request",
        owner=request.work.request_id,
        reason=f"{request.state.value}: this {what} {_STATES[request.state]}",
        age_s=now_s - request.arrival_s,
        deadline_s=None if end_s is None else end_s - now_s,
        note=NO_DEADLINE if end_s is None else "",
        block_ids=tuple(request.table.blocks),
    )
