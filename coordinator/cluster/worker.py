"""What is known of workers: values that the table holds and routing reads.

    Hello -- register --> Worker <-- heartbeat -- Load
                            |
                            '-- all of them at one moment --> ClusterView

No value holds a result of elapsed time. Rows hold moments of the coordinator's monotonic clock,
and what depends on time is computed from them and from the moment of the view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from engine.base.types import (
    NO_BUDGETS,
    NO_KV_POOL,
    Health,
    KVLink,
    KVPool,
    ModelIdentity,
    Peer,
    Role,
    RoleBudgets,
)

HEARTBEAT_S = 0.5
SILENCE_S = 3.0  # without a heartbeat: suspect
FORGET_S = 60.0  # a suspect stays in the table, for operators to see
# What a row has of the worker's Hello.
_SHOWN = ("peer", "role", "http_address", "model", "kv_pool")
# What a row keeps where the same process registers again.
_KEPT = ("since_s", "load", "assigned_requests", "assigned_tokens", "penalized_until_s", "is_sick")


class WorkerState(Enum):
    """State of a worker as its coordinator sees it."""

    READY = "ready"
    DRAINING = "draining"
    SUSPECT = "suspect"


@dataclass(frozen=True, slots=True)
class Totals:
    """Counters since the worker started."""

    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    blocks_pulled: int = 0
    bytes_pulled: int = 0
    pull_seconds: float = 0.0
    stale_reads: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What a worker reported last."""

    num_running: int = 0
    num_waiting: int = 0
    waiting_tokens: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    held_blocks: int = 0
    total_blocks: int = 0
    quarantined_blocks: int = 0
    draining: bool = False
    health: Health = Health.OK
    links: tuple[KVLink, ...] = ()  # to the peers that it has read from
    role_budgets: RoleBudgets = NO_BUDGETS  # until the first heartbeat
    totals: Totals = field(default_factory=Totals)


@dataclass(frozen=True, slots=True)
class Hello:
    """How a worker introduces itself."""

    peer: Peer
    role: Role
    http_address: str
    model: ModelIdentity
    protocol_version: int
    kv_pool: KVPool = NO_KV_POOL


@dataclass(frozen=True, slots=True)
class Worker:
    """One row of the table. All moments (`*_s`) are monotonic."""

    peer: Peer
    role: Role
    http_address: str
    model: ModelIdentity
    state: WorkerState
    load: Load
    session: int  # of its stream; messages of an older stream are ignored
    since_s: float  # registration of this incarnation
    heard_s: float  # last sign of life, or the moment when it was lost
    # Sent by this coordinator and not finished: newer than any heartbeat.
    assigned_requests: int = 0
    assigned_tokens: int = 0
    penalized_until_s: float = -math.inf  # set when a request failed
    kv_pool: KVPool = NO_KV_POOL
    is_sick: bool = False
    beat_s: float = 0.0  # registration or last heartbeat
    stalled_s: float = -math.inf  # last report that its event loop stalls

    @classmethod
    def of(cls, hello: Hello, session: int, now_s: float, old: Worker | None) -> Worker:
        """The row of a worker that registers where `old` was, which may be the same process."""
        row: dict[str, Any] = {name: getattr(hello, name) for name in _SHOWN}
        row |= {"state": WorkerState.READY, "load": Load(), "session": session}
        row |= {"since_s": now_s, "heard_s": now_s, "beat_s": now_s}
        if old is not None and old.peer.incarnation == hello.peer.incarnation:
            row |= {name: getattr(old, name) for name in _KEPT}
        return cls(**row)

    @property
    def expires_s(self) -> float:
        """After this moment a suspect is forgotten, and any other worker is suspect."""
        if self.state is WorkerState.SUSPECT:
            return self.heard_s + FORGET_S
        return max(self.heard_s, self.stalled_s) + SILENCE_S

    def is_degraded(self, now_s: float) -> bool:
        """Whether other workers are preferred at this moment."""
        return (
            now_s < self.penalized_until_s
            or now_s - self.heard_s > SILENCE_S  # its event loop stalls
            or self.load.health is not Health.OK
            or self.is_sick
        )

    def is_heard(self, now_s: float) -> bool:
        """Whether it is not suspect, and sent a heartbeat very recently."""
        return self.state is not WorkerState.SUSPECT and now_s - self.heard_s < 2 * HEARTBEAT_S


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All workers at one moment."""

    workers: tuple[Worker, ...]  # in order of worker_id
    now_s: float  # the moment; monotonic

    def ready(self, role: Role) -> list[Worker]:
        """Workers of `role` that take new requests."""
        return [w for w in self.workers if w.role is role and w.state is WorkerState.READY]

    def is_heard(self, incarnation: str) -> bool:
        """Whether this process is in the table and sent a heartbeat very recently."""
        return any(
            w.peer.incarnation == incarnation and w.is_heard(self.now_s) for w in self.workers
        )
