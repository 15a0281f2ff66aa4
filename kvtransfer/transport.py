"""The seam between a data plane and the transport that moves its bytes, and their common values.

A `Transport` is called on the data-plane thread alone (except for its end: see `connections`) and
need not be thread-safe. It only reads from peers, never writes to them: the process whose memory is
written moves the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from engine.base.errors import DiptychError
from engine.base.kv_layout import LayerGroup
from engine.base.types import MemoryKind

RegionKind = Literal["blocks", "generations"]


class TransferError(DiptychError):
    """A pull that failed; the bytes that it read must not be used."""


class PeerLost(TransferError):
    """The peer is gone, or is another incarnation: connect anew, or use another peer."""


class PullTimeout(TransferError):
    """The reads did not end in time; their destination stays reserved until they do."""


class PullFailed(TransferError):
    """The pull failed for another reason than the death of its peer."""


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """A stretch of one process's memory, as the transport registers it."""

    address: int
    num_bytes: int
    kind: MemoryKind = "DRAM"
    device_id: int = 0


@dataclass(frozen=True, slots=True)
class Agent:
    """A transport as peers reach it: its name is never used again."""

    name: str
    metadata: bytes


@dataclass(frozen=True, slots=True)
class Region:
    """Memory of one rank of a worker: one item a block, `stride` bytes apart.

    Attributes:
        kind: `blocks` are keys and values, `generations` unsigned 64-bit integers.
        rank: of tensor parallelism.
        agent: name of the agent that reaches it.
        groups: of `blocks`: the layers and heads that an item holds.
    """

    kind: RegionKind
    rank: int
    agent: str
    stride: int
    memory: MemoryRegion
    groups: tuple[LayerGroup, ...] = ()


@dataclass(frozen=True, slots=True)
class RemotePool:
    """A worker's KV pool as its peers see it: what a handshake hands out.

    `regions` are the blocks of each rank, by rank, and the generations of all.
    """

    incarnation: str
    num_blocks: int
    regions: tuple[Region, ...]
    agents: tuple[Agent, ...]  # those that the regions name; others after a data plane began anew
    machine: str = ""  # equal for two workers of one machine

    @property
    def blocks(self) -> tuple[Region, ...]:
        """The blocks of each rank."""
        return tuple(region for region in self.regions if region.kind == "blocks")

    @property
    def generations(self) -> Region:
        """The generations of all blocks."""
        return next(region for region in self.regions if region.kind == "generations")

    @property
    def memory_kind(self) -> MemoryKind:
        """Where the blocks lie."""
        return self.blocks[0].memory.kind


class Extent(NamedTuple):
    """One contiguous read; offsets count from the start of the two regions."""

    remote_offset: int
    local_offset: int
    num_bytes: int


class ReadState(Enum):
    """Where a posted read stands."""

    PENDING = "pending"
    DONE = "done"


PeerHandle: TypeAlias = Any  # opaque, made by a transport
ReadHandle: TypeAlias = Any


class Transport(Protocol):
    """One-sided reads from registered memory of other processes."""

    def register(self, regions: Sequence[MemoryRegion]) -> None:
        """Make memory readable by peers and writable by reads; it must outlive the transport."""

    def metadata(self) -> bytes:
        """What a peer needs to connect; taken after `register`."""

    def connect(self, agent: str, metadata: bytes) -> PeerHandle:
        """Load a peer's metadata. PeerLost: it names another agent; PullFailed: unreadable."""

    def disconnect(self, peer: PeerHandle) -> None:
        """Forget a peer; none of its reads is pending. Never raises for a dead one."""

    def post_read(
        self, peer: PeerHandle, remote: MemoryRegion, local: MemoryRegion, extents: Sequence[Extent]
    ) -> ReadHandle:
        """Start reading; may block for the whole copy. Raises PeerLost or PullFailed."""

    def poll(self, handle: ReadHandle) -> ReadState:
        """Where a read stands; raises PeerLost or PullFailed once when it failed.

        After an error some of its bytes may still land for a moment: see `pull`.
        """

    def release(self, handle: ReadHandle) -> None:
        """Free a handle that is DONE or has failed. Never raises."""

    def lane(self, kind: MemoryKind, *, same_machine: bool) -> str:
        """The lane of reads from such a peer, to be shown; "": unknown. Any thread may call."""

    def close(self) -> None:
        """Deregister and end, reads pending or not: once it returns, no byte of them lands.

        Called by any thread, while no other uses the transport; it may hang or raise.
        """
