"""The seam between a data plane and whatever moves its bytes, and the values both speak of.

A `Transport` is called on the data-plane thread alone (but for its end: see `connections`) and need
not be thread-safe. It only ever reads from peers (decode leads: the process whose memory is written
moves the bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from engine.base.errors import DiptychError

MemoryKind = Literal["DRAM", "VRAM"]
GENERATION_BYTES = 8


class TransferError(DiptychError):
    """A pull that did not succeed; what it read must not be used."""


class PeerLost(TransferError):
    """The peer is gone, or is not the incarnation that was meant: connect anew or go elsewhere."""


class PullTimeout(TransferError):
    """The reads did not end in the time given; their destination stays reserved until they do."""


class PullFailed(TransferError):
    """The pull could not be carried out, for a reason that is not the peer's death."""


@dataclass(frozen=True, slots=True)
class MemoryRegion:
    """A stretch of one process's memory, as the transport registers it."""

    address: int
    num_bytes: int
    kind: MemoryKind = "DRAM"
    device_id: int = 0


@dataclass(frozen=True, slots=True)
class RemotePool:
    """A worker's KV pool as its peers see it: what a handshake hands out.

    `blocks` holds num_blocks extents of block_bytes, `generations` num_blocks unsigned 64-bit
    integers.
    """

    incarnation: str
    blocks: MemoryRegion
    generations: MemoryRegion
    num_blocks: int
    block_bytes: int
    metadata: bytes
    agent: str  # whom the metadata names: another one after its data plane began anew
    machine: str = ""  # equal for two workers of one machine


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
        """Load a peer's metadata. PeerLost: it names another; PullFailed: unreadable."""

    def disconnect(self, peer: PeerHandle) -> None:
        """Forget a peer; none of its reads is pending. Never raises for a dead one."""

    def post_read(
        self, peer: PeerHandle, remote: MemoryRegion, local: MemoryRegion, extents: Sequence[Extent]
    ) -> ReadHandle:
        """Start reading; may block for the whole copy. Raises PeerLost or PullFailed."""

    def poll(self, handle: ReadHandle) -> ReadState:
        """Where a read stands; raises PeerLost or PullFailed once when it failed.

        After an error a moment may pass until nothing of it lands any more: see `pull`.
        """

    def release(self, handle: ReadHandle) -> None:
        """Give back a handle that is DONE or has failed. Never raises."""

    def lane(self, kind: MemoryKind, *, same_machine: bool) -> str:
        """The lane of reads from such a peer, for people; "": not known. Any thread may call."""

    def close(self) -> None:
        """Deregister and end, reads pending or not: once it returns, nothing of them lands.

        Called by any thread, while nobody else uses the transport; it may hang or raise.
        """
