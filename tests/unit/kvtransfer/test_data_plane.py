"""The data plane's rules, over a transport whose reads end when the test lets them."""

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import pytest

from engine.base.kv_layout import LayerGroup
from kvtransfer.pull import SLICE_BYTES
from kvtransfer.transport import (
    Agent,
    PeerLost,
    PullFailed,
    PullTimeout,
    ReadState,
    Region,
    RemotePool,
)
from tests.support.gated import BLOCK_BYTES, NUM_BLOCKS, Rig, region, until


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.transport.gate = lambda read: ReadState.DONE
    assert rig.plane.stop()
    assert rig.transport.log[-1] == "close"


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


def two_ranks(rig: Rig, halves: list[np.ndarray]) -> RemotePool:
    """The pool of a peer that holds one half of each block on rank 0, one on rank 1."""
    half = BLOCK_BYTES // 2
    blocks = [
        Region("blocks", rank, f"{name}.1", half, region(part), (LayerGroup(rank, 1, half, 0),))
        for rank, (name, part) in enumerate(zip("pq", halves, strict=True))
    ]
    generations = Region("generations", 0, "p.1", 8, region(rig.source_gens))
    agents = (Agent("p.1", b"p.1"), Agent("q.1", b"q.1"))
    return RemotePool("peer", NUM_BLOCKS, (*blocks, generations), agents)


@pytest.fixture
def two_heads() -> Iterator[Rig]:
    rig = Rig(groups=(LayerGroup(0, 2, BLOCK_BYTES // 2, 0),))
    yield rig
    assert rig.plane.stop()


def test_a_block_is_gathered_from_the_ranks_of_a_peer(two_heads: Rig) -> None:
    """Each rank's heads by its own agent; the generations once, after both."""
    rig = two_heads
    halves = [np.ascontiguousarray(part) for part in np.split(rig.source, 2, axis=1)]
    pool = two_ranks(rig, halves)
    rig.plane.connect(pool).result(5)
    remote, local = [3, 4, 5, 9], [1, 2, 3, 0]
    expected = rig.expected(remote)
    expected[1] += 1
    result = rig.plane.pull(pool, remote, local, expected, 5).done.result(5)
    assert (rig.local[local] == rig.source[remote]).all()
    assert not rig.local[4:].any()
    assert (result.stale, result.num_bytes) == ((1,), 4 * BLOCK_BYTES)
    assert result.num_extents == 8, "one a block and rank"
    reads = [(read.peer, read.is_fence) for read in rig.transport.reads]
    assert reads == [("p", False), ("q", False), ("p", True)]
    rig.plane.disconnect("peer").result(5)
    assert rig.transport.log == ["connect p.1", "connect q.1", "disconnect p", "disconnect q"]


def test_a_peer_is_connected_to_all_its_agents_or_to_none(two_heads: Rig) -> None:
    rig = two_heads
    halves = [np.ascontiguousarray(part) for part in np.split(rig.source, 2, axis=1)]
    good = two_ranks(rig, halves)
    bad = dataclasses.replace(good, agents=(good.agents[0], Agent("q.1", b"other")))
    with pytest.raises(PeerLost, match="metadata of other"):
        rig.plane.connect(bad).result(5)
    assert rig.transport.log == ["connect p.1", "disconnect p"]
    with pytest.raises(PeerLost, match="not connected"):
        rig.plane.pull(bad, [1], [1], rig.expected([1]), 5).done.result(5)
    rig.plane.connect(good).result(5)
    assert not rig.plane.pull(good, [1], [1], rig.expected([1]), 5).done.result(5).stale


def test_an_empty_pull_is_done_at_once(rig: Rig) -> None:
    pull = rig.plane.pull(rig.peer("p"), [], [], [], 5)
    assert pull.done.result(5).num_blocks == 0
    assert not rig.transport.reads


def test_timeout_fails_at_once_and_settles_when_the_read_ends(rig: Rig) -> None:
    pool = rig.peer("p")
    rig.transport.gate = lambda read: ReadState.PENDING
    pull = rig.plane.pull(pool, [1, 2], [1, 2], rig.expected([1, 2]), 0.05)
    with pytest.raises(PullTimeout, match="peer p"):
        pull.done.result(5)
    until(lambda: rig.plane.counters.num_quarantined_blocks == 2)
    # A stuck read blocks no other pull, and its blocks are not settled.
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
    until(lambda: rig.transport.log == ["connect p.1", "disconnect p"])
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
    with pytest.raises(ValueError, match="on no rank"):
        rest = dataclasses.replace(pool, regions=pool.regions[1:])
        rig.plane.pull(rest, [1], [0], [0], 1)
    with pytest.raises(ValueError, match="2 generations for 1 blocks"):
        rig.plane.pull(pool, [1], [0], [0, 1], 1)
    assert BLOCK_BYTES < SLICE_BYTES


def test_a_dead_data_plane_is_seen_and_leaves_no_caller_waiting(rig: Rig) -> None:
    pool = rig.peer("p")
    rig.transport.gate = lambda read: ReadState.PENDING
    pull = rig.plane.pull(pool, [1], [1], rig.expected([1]), 60)
    until(lambda: len(rig.transport.reads) == 1)
    rig.peer("q")
    rig.transport.disconnect = _broken  # type: ignore[method-assign]
    rig.plane.disconnect("q")
    with pytest.raises(PullFailed, match="died"):
        pull.done.result(5)
    assert not pull.settled.done()  # its read may still write, and is not polled any more
    assert "a bug" in rig.plane.died.result(5)
    with pytest.raises(PullFailed, match="stopped"):
        rig.plane.pull(pool, [2], [2], rig.expected([2]), 60).done.result(5)
    rig.plane = Rig().plane  # the fixture's own checks want one that can stop
    rig.transport.log.append("close")


def _broken(peer: str) -> None:
    raise KeyError("a bug")


def test_a_stop_is_no_death(rig: Rig) -> None:
    other = Rig()
    assert other.plane.stop()
    assert not other.plane.died.done()
