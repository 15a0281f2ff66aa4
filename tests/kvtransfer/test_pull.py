"""The data plane's rules, over a transport whose reads end when the test says so."""

import ctypes
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from kvtransfer.base import (
    Extent,
    MemoryRegion,
    PeerLost,
    PullFailed,
    PullTimeout,
    ReadState,
    RemotePool,
)
from kvtransfer.pull import DataPlane
from kvtransfer.reads import SLICE_BYTES

NUM_BLOCKS, BLOCK_BYTES = 16, 64


@dataclass
class Read:
    peer: str
    is_fence: bool
    extents: Sequence[Extent]
    state: ReadState | Exception = ReadState.PENDING
    released: bool = False


@dataclass
class GatedTransport:
    """Copies within this process; a read lands when `gate` lets it through."""

    gate: Callable[[Read], ReadState | Exception] = lambda read: ReadState.DONE
    reads: list[Read] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    thread: int | None = None

    def _on_thread(self) -> None:
        self.thread = self.thread or threading.get_ident()
        assert self.thread == threading.get_ident()

    def register(self, regions: Sequence[MemoryRegion]) -> None:
        self._on_thread()

    def metadata(self) -> bytes:
        return b"here"

    def connect(self, incarnation: str, metadata: bytes) -> str:
        self._on_thread()
        return incarnation

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

    def close(self) -> None:
        self._on_thread()
        self.log.append("close")


class Rig:
    def __init__(self) -> None:
        self.transport = GatedTransport()
        rng = np.random.default_rng(1)
        self.source = rng.integers(0, 255, (NUM_BLOCKS, BLOCK_BYTES), dtype=np.uint8)
        self.source_gens = rng.integers(0, 2**63, NUM_BLOCKS, dtype=np.uint64)
        self.local = np.zeros_like(self.source)
        self.gens = np.zeros(NUM_BLOCKS, dtype=np.uint64)
        self.plane = DataPlane(
            lambda: self.transport,
            incarnation="me",
            blocks=region(self.local),
            generations=region(self.gens),
            num_blocks=NUM_BLOCKS,
            block_bytes=BLOCK_BYTES,
        )
        self.plane.start()

    def peer(self, name: str) -> RemotePool:
        pool = RemotePool(
            name, region(self.source), region(self.source_gens), NUM_BLOCKS, BLOCK_BYTES, b""
        )
        self.plane.connect(pool).result(5)
        return pool

    def expected(self, ids: Sequence[int]) -> list[int]:
        return [int(self.source_gens[i]) for i in ids]


def region(array: np.ndarray) -> MemoryRegion:
    return MemoryRegion(array.ctypes.data, array.nbytes)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.transport.gate = lambda read: ReadState.DONE
    assert rig.plane.stop()
    assert rig.transport.log[-1] == "close"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_pull_copies_fences_and_counts(rig: Rig) -> None:
    pool = rig.peer("p")
    remote, local = [3, 4, 5, 9], [1, 2, 3, 0]
    expected = rig.expected(remote)
    expected[2] += 1
    pull = rig.plane.pull(pool, remote, local, expected, 5)
    result = pull.done.result(5)
    pull.settled.result(5)
    assert result.stale == (2,) and result.num_extents == 2
    assert result.num_bytes == 4 * BLOCK_BYTES
    assert (rig.local[local] == rig.source[remote]).all()
    counters = rig.plane.counters
    assert (counters.num_pulls, counters.num_blocks, counters.num_stale_blocks) == (1, 4, 1)
    assert [read.is_fence for read in rig.transport.reads] == [False, True]


def test_an_empty_pull_is_done_at_once(rig: Rig) -> None:
    pull = rig.plane.pull(rig.peer("p"), [], [], [], 5)
    assert pull.done.result(5).num_blocks == 0
    assert not rig.transport.reads


def test_timeout_answers_at_once_and_settles_when_the_read_ends(rig: Rig) -> None:
    pool = rig.peer("p")
    rig.transport.gate = lambda read: ReadState.PENDING
    pull = rig.plane.pull(pool, [1, 2], [1, 2], rig.expected([1, 2]), 0.05)
    with pytest.raises(PullTimeout, match="peer p"):
        pull.done.result(5)
    until(lambda: rig.plane.counters.num_quarantined_blocks == 2)
    # A stuck read neither blocks other pulls nor the answer to "may I free these blocks": no.
    rig.transport.gate = lambda read: ReadState.PENDING if read.peer == "p" else ReadState.DONE
    assert not rig.plane.pull(rig.peer("q"), [3], [3], rig.expected([3]), 5).done.result(5).stale
    gone = rig.plane.disconnect("p")
    time.sleep(0.1)
    assert not pull.settled.done() and not gone.done()
    rig.transport.gate = lambda read: ReadState.DONE
    pull.settled.result(5)
    gone.result(5)
    until(lambda: rig.plane.counters.num_quarantined_blocks == 0)
    assert not any(read.is_fence for read in rig.transport.reads if read.peer == "p")


def test_cancel_posts_nothing_more(rig: Rig) -> None:
    pool = rig.peer("p")
    rig.transport.gate = lambda read: ReadState.PENDING
    pull = rig.plane.pull(pool, [1], [1], rig.expected([1]), 5)
    until(lambda: len(rig.transport.reads) == 1)
    pull.cancel()
    with pytest.raises(PullFailed, match="cancelled"):
        pull.done.result(5)
    assert not pull.settled.done()
    rig.transport.gate = lambda read: ReadState.DONE
    pull.settled.result(5)
    assert len(rig.transport.reads) == 1


def test_a_lost_peer_is_closed_and_may_come_back(rig: Rig) -> None:
    pool = rig.peer("p")
    rig.transport.gate = lambda read: PeerLost("peer p: gone")
    pull = rig.plane.pull(pool, [1], [1], rig.expected([1]), 5)
    with pytest.raises(PeerLost, match="gone"):
        pull.done.result(5)
    assert not pull.settled.done()  # not before the quiet time is over
    pull.settled.result(5)
    until(lambda: rig.transport.log == ["disconnect p"])
    again = rig.plane.pull(pool, [1], [1], rig.expected([1]), 5)
    with pytest.raises(PeerLost, match="not connected"):
        again.done.result(5)
    again.settled.result(0)
    rig.transport.gate = lambda read: ReadState.DONE
    rig.peer("p")
    assert not rig.plane.pull(pool, [1], [1], rig.expected([1]), 5).done.result(5).stale


def test_a_bug_in_the_transport_fails_one_pull_only(rig: Rig) -> None:
    pool = rig.peer("p")
    rig.transport.gate = lambda read: KeyError("bug")
    with pytest.raises(PullFailed, match="bug"):
        rig.plane.pull(pool, [1], [1], rig.expected([1]), 5).done.result(5)
    rig.transport.gate = lambda read: ReadState.DONE
    until(lambda: all(read.released or not read.is_fence for read in rig.transport.reads))
    other = rig.peer("q")
    assert not rig.plane.pull(other, [2], [2], rig.expected([2]), 5).done.result(5).stale


def test_stop_fails_what_is_in_flight_and_refuses_the_rest(rig: Rig) -> None:
    pool = rig.peer("p")
    rig.transport.gate = lambda read: ReadState.PENDING
    pull = rig.plane.pull(pool, [1], [1], rig.expected([1]), 60)
    until(lambda: len(rig.transport.reads) == 1)
    assert not rig.plane.stop(timeout_s=0.1)
    with pytest.raises(PullFailed, match="stopping"):
        pull.done.result(0)
    assert not pull.settled.done()  # its read never ended, so its blocks stay reserved
    with pytest.raises(PullFailed, match="stopped"):
        rig.plane.pull(pool, [2], [2], rig.expected([2]), 60).done.result(0)
    with pytest.raises(PullFailed, match="stopped"):
        rig.plane.connect(pool).result(0)
    rig.plane = Rig().plane  # the fixture's own checks want one that can stop
    rig.transport.log.append("close")


def test_wrong_arguments_are_refused_at_once(rig: Rig) -> None:
    pool = rig.peer("p")
    with pytest.raises(ValueError, match="remote block id 16 "):
        rig.plane.pull(pool, [16], [0], [0], 1)
    with pytest.raises(ValueError, match="2 generations for 1 blocks"):
        rig.plane.pull(pool, [1], [0], [0, 1], 1)
    assert BLOCK_BYTES < SLICE_BYTES


def test_a_dead_data_plane_is_seen_and_leaves_nobody_waiting(rig: Rig) -> None:
    pool = rig.peer("p")
    rig.transport.gate = lambda read: ReadState.PENDING
    pull = rig.plane.pull(pool, [1], [1], rig.expected([1]), 60)
    until(lambda: len(rig.transport.reads) == 1)
    rig.peer("q")
    rig.transport.disconnect = _broken  # type: ignore[method-assign]
    rig.plane.disconnect("q")
    with pytest.raises(PullFailed, match="died"):
        pull.done.result(5)
    assert not pull.settled.done()  # its read may still write, and nobody watches it any more
    assert "a bug" in rig.plane.died.result(5)
    with pytest.raises(PullFailed, match="stopped"):
        rig.plane.pull(pool, [2], [2], rig.expected([2]), 60).done.result(5)
    rig.plane = Rig().plane  # the fixture's own checks want one that can stop
    rig.transport.log.append("close")


def _broken(peer: str) -> None:
    raise KeyError("a bug")


def test_a_read_that_never_ends_ends_the_data_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory cannot be given back in any other way that does not depend on the peer."""
    monkeypatch.setattr("kvtransfer.pull.QUARANTINE_S", 0.2)
    rig = Rig()
    rig.transport.gate = lambda read: ReadState.PENDING
    pull = rig.plane.pull(rig.peer("p"), [1], [1], rig.expected([1]), 0.05)
    with pytest.raises(PullTimeout):
        pull.done.result(5)
    assert not rig.plane.died.done()
    assert "peer p" in rig.plane.died.result(5)
    assert not pull.settled.done()


def test_a_stop_is_no_death(rig: Rig) -> None:
    other = Rig()
    assert other.plane.stop()
    assert not other.plane.died.done()
