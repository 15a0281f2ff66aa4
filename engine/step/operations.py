"""Operations of the event loop on an engine: values, applied on its thread between two steps.

    Add Abort Abandon             the life of a request
    BlocksArrived FetchEnded      its fetch from a peer
    Hold Pin Unpin                references to blocks: of leases, and of reads that go on
    SetRoleBudgets                what is taken from others
    Forget                        a peer computed numbers that are not finite
    ListHolds                     what /debug/holds shows

The set is closed in the product, so a log or a test can name each thing that reaches an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from engine.base.types import RoleBudgets
from engine.scheduling.holds import EngineHolds
from engine.scheduling.request import EngineRequest
from engine.step.core import EngineCore

T = TypeVar("T")


class Operation(Generic[T]):
    """One thing to do on the engine thread, with a result of type T."""

    __slots__ = ()

    def apply(self, core: EngineCore) -> T:
        """Do it. An exception reaches the caller of `EngineThread.call`."""
        raise NotImplementedError

    def undo(self, core: EngineCore, result: T) -> None:
        """Take `apply` back: its caller stopped waiting before the result came."""


@dataclass(frozen=True, slots=True)
class Add(Operation[None]):
    """Queue a request under a fresh key."""

    key: int
    request: EngineRequest

    def apply(self, core: EngineCore) -> None:
        core.add(self.key, self.request)


@dataclass(frozen=True, slots=True)
class Abort(Operation[None]):
    """End a request; no read may still write to its blocks."""

    key: int

    def apply(self, core: EngineCore) -> None:
        core.abort(self.key)


@dataclass(frozen=True, slots=True)
class Abandon(Operation[None]):
    """Let other requests compute the blocks that this one was going to produce."""

    key: int

    def apply(self, core: EngineCore) -> None:
        core.abandon_production(self.key)


@dataclass(frozen=True, slots=True)
class BlocksArrived(Operation[None]):
    """The first `num_blocks` blocks of a fetching request passed the fence."""

    key: int
    num_blocks: int

    def apply(self, core: EngineCore) -> None:
        core.blocks_arrived(self.key, self.num_blocks)


@dataclass(frozen=True, slots=True)
class FetchEnded(Operation[None]):
    """No more blocks come and no read is in flight; `num_cached_tokens` as the peer counted."""

    key: int
    num_cached_tokens: int | None = None

    def apply(self, core: EngineCore) -> None:
        core.fetch_ended(self.key, self.num_cached_tokens)


@dataclass(frozen=True, slots=True)
class Hold(Operation[tuple[list[int], list[int]]]):
    """Pin the longest leading run of these hashes: (block ids, generations)."""

    hashes: tuple[bytes, ...]

    def apply(self, core: EngineCore) -> tuple[list[int], list[int]]:
        return core.hold(self.hashes)

    def undo(self, core: EngineCore, result: tuple[list[int], list[int]]) -> None:
        core.unpin(result[0])


@dataclass(frozen=True, slots=True)
class Pin(Operation[None]):
    """Add one reference to each block."""

    block_ids: Sequence[int]

    def apply(self, core: EngineCore) -> None:
        core.pin(self.block_ids)

    def undo(self, core: EngineCore, result: None) -> None:
        core.unpin(self.block_ids)


@dataclass(frozen=True, slots=True)
class Unpin(Operation[None]):
    """Drop one reference of each block."""

    block_ids: Sequence[int]

    def apply(self, core: EngineCore) -> None:
        core.unpin(self.block_ids)


@dataclass(frozen=True, slots=True)
class SetRoleBudgets(Operation[None]):
    """Take so much from others from the next step on."""

    role_budgets: RoleBudgets

    def apply(self, core: EngineCore) -> None:
        core.scheduler.set_role_budgets(self.role_budgets)


@dataclass(frozen=True, slots=True)
class Forget(Operation[None]):
    """Use no block that this peer, by its incarnation, had a part in."""

    source: str

    def apply(self, core: EngineCore) -> None:
        core.forget(self.source)


@dataclass(frozen=True, slots=True)
class ListHolds(Operation[EngineHolds]):
    """Every request with its blocks, and the pool."""

    def apply(self, core: EngineCore) -> EngineHolds:
        return core.holds()
