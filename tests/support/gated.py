"""A data plane over transports that copy within the process; reads end when the test lets them."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.base.kv_layout import LayerGroup
from kvtransfer.data_plane import DataPlane
from kvtransfer.quarantine import Quarantine
from kvtransfer.transport import (
    Agent,
    Extent,
    MemoryRegion,
    PeerLost,
    ReadState,
    Region,
    RemotePool,
)

NUM_BLOCKS, BLOCK_BYTES = 16, 64
WHOLE = (LayerGroup(0, 1, BLOCK_BYTES, 0),)  # a block is one head of one group


@dataclass
class Read:
    peer: str
    is_fence: bool
    extents: Sequence[Extent]
    state: ReadState | Exception = ReadState.PENDING
    released: bool = False


@dataclass
class GatedTransport:
    """One agent's; a read lands when `gate` lets it through, and none once it is closed."""

    agent: str = "me.1"
    gate: Callable[[Read], ReadState | Exception] = lambda read: ReadState.DONE
    reads: list[Read] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    thread: int | None = None
    closed: bool = False

    def _on_thread(self) -> None:
        assert not self.closed
        self.thread = self.thread or threading.get_ident()
        assert self.thread == threading.get_ident()

    def register(self, regions: Sequence[MemoryRegion]) -> None:
        self._on_thread()

    def metadata(self) -> bytes:
        return self.agent.encode()

    def connect(self, agent: str, metadata: bytes) -> str:
        """Peers are named by their incarnation, as tests know them."""
        self._on_thread()
        if metadata.decode() != agent:
            raise PeerLost(f"metadata of {metadata.decode()}, not {agent}")
        self.log.append(f"connect {agent}")
        return agent.partition(".")[0]

    def disconnect(self, peer: str) -> None:
        self._on_thread()
        assert all(read.released for read in self.reads if read.peer == peer)
        self.log.append(f"disconnect {peer}")

    def post_read(
        self, peer: str, remote: MemoryRegion, local: MemoryRegion, extents: Sequence[Extent]
    ) -> tuple[Read, MemoryRegion, MemoryRegion]:
        self._on_thread()
        is_fence = remote.num_bytes == NUM_BLOCKS * 8
        if is_fence:
            assert all(read.released for read in self.reads if read.peer == peer)
        self.reads.append(Read(peer, is_fence, extents))
        return self.reads[-1], remote, local

    def poll(self, handle: tuple[Read, MemoryRegion, MemoryRegion]) -> ReadState:
        self._on_thread()
        read, remote, local = handle
        state = self.gate(read)
        if isinstance(state, Exception):
            raise state
        if state is ReadState.DONE:
            for source, target, size in read.extents:
                ctypes.memmove(local.address + target, remote.address + source, size)
        return state

    def release(self, handle: tuple[Read, MemoryRegion, MemoryRegion]) -> None:
        handle[0].released = True

    def lane(self, kind: str, *, same_machine: bool) -> str:
        return "test/memory" if same_machine else "test/wire"

    def close(self) -> None:
        assert not self.closed
        self.log.append("close")
        self.closed = True


class Rig:
    def __init__(
        self, quarantine: Quarantine | None = None, groups: tuple[LayerGroup, ...] = WHOLE
    ) -> None:
        self.transports: list[GatedTransport] = []
        self.num_restarts = 0
        rng = np.random.default_rng(1)
        self.source = rng.integers(0, 255, (NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
        self.source_gens = rng.integers(0, 2**63, NUM_BLOCKS, dtype=np.uint64)
        self.local = np.zeros_like(self.source)
        self.gens = np.zeros(NUM_BLOCKS, dtype=np.uint64)
        self.plane = DataPlane(
            self.open,
            incarnation="me",
            blocks=region(self.local),
            generations=region(self.gens),
            num_blocks=NUM_BLOCKS,
            block_bytes=BLOCK_BYTES,
            groups=groups,
            quarantine=quarantine,
            on_restart=self.restarted,
        )
        self.plane.start()

    @property
    def transport(self) -> GatedTransport:
        """That of the agent of this moment."""
        return self.transports[-1]

    def open(self, agent: str) -> GatedTransport:
        """The next one; the gate is the same."""
        gate: Any = {"gate": self.transport.gate} if self.transports else {}
        self.transports.append(GatedTransport(agent, **gate))
        return self.transport

    def restarted(self) -> None:
        self.num_restarts += 1

    def pool(self, name: str, number: int = 1) -> RemotePool:
        """A peer's pool; all peers have the same memory."""
        blocks, generations = region(self.source), region(self.source_gens)
        agent = f"{name}.{number}"
        return RemotePool(
            name,
            NUM_BLOCKS,
            (
                Region("blocks", 0, agent, BLOCK_BYTES, blocks, WHOLE),
                Region("generations", 0, agent, 8, generations),
            ),
            (Agent(agent, agent.encode()),),
        )

    def peer(self, name: str) -> RemotePool:
        """Such a pool, connected."""
        pool = self.pool(name)
        self.plane.connect(pool).result(5)
        return pool

    def expected(self, ids: Sequence[int]) -> list[int]:
        return [int(self.source_gens[i]) for i in ids]


def region(array: np.ndarray) -> MemoryRegion:
    return MemoryRegion(array.ctypes.data, array.nbytes)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
