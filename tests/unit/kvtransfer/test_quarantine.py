"""Reads that never end: what they keep, the two bounds, and the data plane's new beginning."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvtransfer.connections import unfreed
from kvtransfer.pull import Pull
from kvtransfer.quarantine import Quarantine
from kvtransfer.transport import Agent, PeerLost, PullFailed, PullTimeout, ReadState
from tests.support.gated import NUM_BLOCKS, Read, Rig, until

SOON = Quarantine(max_s=0.3, share=1.0)


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.quarantine.PATIENCE_S", 0.2)
    monkeypatch.setattr("kvtransfer.pull.QUIET_S", 0.1)
    monkeypatch.setattr("kvtransfer.pull_loop._END_S", 0.5)


@pytest.fixture(autouse=True)
def never_freed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    kept: list[Any] = []
    monkeypatch.setattr("kvtransfer.connections._NEVER_FREED", kept)
    return kept


@pytest.fixture
def rigs() -> Iterator[list[Rig]]:
    """Rigs to be stopped after the test."""
    rigs: list[Rig] = []
    yield rigs
    for rig in rigs:
        rig.transport.gate = lambda read: ReadState.DONE
        assert rig.plane.stop()


def stuck(read: Read) -> ReadState:
    return ReadState.PENDING if read.peer == "p" else ReadState.DONE


def rig_with_a_stuck_read(
    rigs: list[Rig], quarantine: Quarantine, num_blocks: int = 2
) -> tuple[Rig, Pull]:
    rig = Rig(quarantine)
    rigs.append(rig)
    rig.transport.gate = stuck
    ids = list(range(num_blocks))
    pull = rig.plane.pull(rig.peer("p"), ids, ids, rig.expected(ids), 0.05, "request-1")
    with pytest.raises(PullTimeout):
        pull.done.result(5)
    return rig, pull


def test_a_read_that_never_ends_restarts_the_data_plane(rigs: list[Rig]) -> None:
    rig, pull = rig_with_a_stuck_read(rigs, SOON)
    until(lambda: rig.plane.counters.num_quarantined_blocks == 2)
    assert rig.plane.agent == "me.1" and not pull.settled.done()
    old = rig.transport
    pull.settled.result(5)
    assert rig.num_restarts == rig.plane.counters.num_restarts == 1
    assert old.closed and rig.transport is not old
    pool = rig.plane.local_pool
    assert pool.incarnation == "me" and pool.agents == (Agent("me.2", b"me.2"),)
    assert {region.agent for region in pool.regions} == {"me.2"}
    until(lambda: rig.plane.counters.num_quarantined_blocks == 0)
    assert not rig.plane.died.done() and not unfreed()
    # The held blocks are free again, and new pulls are served.
    ids = [0, 1]
    assert not rig.plane.pull(rig.peer("q"), ids, ids, rig.expected(ids), 5).done.result(5).stale
    assert (rig.local[ids] == rig.source[ids]).all()


def test_the_fence_waits_for_the_quiet_after_the_end(
    rigs: list[Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU may still copy for an agent that has ended; its blocks are not freed at once."""
    monkeypatch.setattr("kvtransfer.pull.QUIET_S", 0.6)
    rig, pull = rig_with_a_stuck_read(rigs, SOON)
    until(lambda: rig.num_restarts == 1)
    assert not pull.settled.done()
    pull.settled.result(5)


def test_pulls_that_had_not_failed_begin_anew(rigs: list[Rig]) -> None:
    """Half read, or at the fence: reads of the old agent do not count."""
    rig, pull = rig_with_a_stuck_read(rigs, SOON)
    slow, fencing = rig.peer("slow"), rig.peer("fencing")
    old = rig.transport

    def gate(read: Read) -> ReadState:
        held = read.peer == "p" or (
            rig.transport is old and not (read.peer == "fencing" and not read.is_fence)
        )
        return ReadState.PENDING if held else ReadState.DONE

    old.gate = gate
    one = rig.plane.pull(slow, [4, 5], [4, 5], rig.expected([4, 5]), 5)
    two = rig.plane.pull(fencing, [6], [6], rig.expected([6]), 5)
    until(lambda: any(read.peer == "fencing" and read.is_fence for read in old.reads))
    assert not one.done.done() and not two.done.done()
    assert not one.done.result(5).stale and not two.done.result(5).stale
    assert rig.num_restarts == 1
    assert (rig.local[4:7] == rig.source[4:7]).all()
    new = [(read.peer, read.is_fence) for read in rig.transport.reads]
    assert new.count(("slow", False)) == new.count(("slow", True)) == 1
    assert new.count(("fencing", False)) == new.count(("fencing", True)) == 1
    pull.settled.result(5)


def test_peers_stay_connected_but_for_those_that_were_closing(rigs: list[Rig]) -> None:
    rig, pull = rig_with_a_stuck_read(rigs, SOON)
    good, lost = rig.peer("good"), rig.pool("p")
    gone = rig.plane.disconnect("p")
    assert not gone.done()  # a read still needs the connection
    until(lambda: rig.num_restarts == 1)
    gone.result(5)
    assert rig.transport.log == ["connect good.1"]
    assert not rig.plane.pull(good, [3], [3], rig.expected([3]), 5).done.result(5).stale
    with pytest.raises(PeerLost, match="not connected"):
        rig.plane.pull(lost, [1], [1], rig.expected([1]), 5).done.result(5)
    rig.transport.gate = lambda read: ReadState.DONE
    rig.peer("p")
    assert not rig.plane.pull(lost, [5], [5], rig.expected([5]), 5).done.result(5).stale
    pull.settled.result(5)


def test_a_share_of_the_pool_is_a_bound_too(rigs: list[Rig]) -> None:
    quarter = Quarantine(max_s=60, share=0.25)
    below, kept = rig_with_a_stuck_read(rigs, quarter, NUM_BLOCKS // 4 - 1)
    reached, freed = rig_with_a_stuck_read(rigs, quarter, NUM_BLOCKS // 4)
    freed.settled.result(5)
    assert reached.num_restarts == 1
    assert below.num_restarts == 0 and not kept.settled.done()


def test_reads_that_end_restart_nothing(rigs: list[Rig]) -> None:
    """Most pulls that fail or are cancelled have reads that end soon, however many blocks."""
    rig, pull = rig_with_a_stuck_read(rigs, Quarantine(max_s=60, share=0.0), NUM_BLOCKS)
    rig.transport.gate = lambda read: ReadState.DONE
    pull.settled.result(5)
    assert rig.num_restarts == 0 and rig.plane.agent == "me.1"


def test_every_restart_has_a_name_of_its_own(rigs: list[Rig]) -> None:
    rig, pull = rig_with_a_stuck_read(rigs, SOON)
    pull.settled.result(5)
    again = rig.plane.pull(rig.peer("p"), [7], [7], rig.expected([7]), 0.05)
    with pytest.raises(PullTimeout):
        again.done.result(5)
    again.settled.result(5)
    assert [transport.agent for transport in rig.transports] == ["me.1", "me.2", "me.3"]


def test_a_peer_that_began_anew_is_connected_anew(rigs: list[Rig]) -> None:
    """Its incarnation is the same, its agent is not."""
    rig = Rig()
    rigs.append(rig)
    rig.peer("p")
    renewed = rig.pool("p", 2)
    with pytest.raises(PeerLost, match="not connected"):
        rig.plane.pull(renewed, [1], [1], rig.expected([1]), 5).done.result(5)
    with pytest.raises(PeerLost, match="still being disconnected"):
        rig.plane.connect(renewed).result(5)
    rig.plane.connect(renewed).result(5)
    assert not rig.plane.pull(renewed, [1], [1], rig.expected([1]), 5).done.result(5).stale
    with pytest.raises(PeerLost, match="not connected"):
        rig.plane.pull(rig.pool("p"), [1], [1], rig.expected([1]), 5).done.result(5)
    assert rig.transport.log == ["connect p.1", "disconnect p", "connect p.2"]


def test_holds_say_for_whom_and_until_when(rigs: list[Rig]) -> None:
    rig, pull = rig_with_a_stuck_read(rigs, Quarantine(max_s=60, share=1.0))
    rig.transport.gate = lambda read: ReadState.PENDING
    under_way = rig.plane.pull(rig.peer("q"), [5], [5], rig.expected([5]), 30, "request-2")
    failed, reading = rig.plane.holds().result(5)
    assert (failed.owner, failed.peer, failed.block_ids) == ("request-1", "p", (0, 1))
    assert failed.kind == "quarantine" and "no end after" in failed.reason
    assert failed.deadline_s and 59 < failed.deadline_s <= 60 and failed.age_s >= 0.05
    assert (reading.owner, reading.peer, reading.block_ids) == ("request-2", "q", (5,))
    assert reading.kind == "pull"
    assert reading.deadline_s and 29 < reading.deadline_s <= 30
    rig.transport.gate = lambda read: ReadState.DONE
    under_way.done.result(5)
    pull.settled.result(5)
    until(lambda: not rig.plane.holds().result(5))


# -- where the process must end --------------------------------------------------------------------


def never_ends() -> None:
    threading.Event().wait(3)


def raises() -> None:
    raise KeyError("boom")


@pytest.mark.parametrize(("close", "why"), [(never_ends, "no end within"), (raises, "boom")])
def test_a_transport_that_does_not_end_ends_the_process(
    close: Any, why: str, never_freed: list[Any]
) -> None:
    """Its reads may still write: their blocks stay, nothing frees it, and `died` has the reason."""
    rig, pull = rig_with_a_stuck_read([], SOON)
    rig.transport.close = close  # type: ignore[method-assign]
    waiting = rig.plane.pull(rig.peer("p"), [9], [9], rig.expected([9]), 30)
    assert why in rig.plane.died.result(5)
    with pytest.raises(PullFailed, match="died"):
        waiting.done.result(5)
    assert not pull.settled.done() and not waiting.settled.done()
    assert rig.transport in [transport for transport, _ in never_freed] and unfreed()
    assert not rig.plane.stop(), "the pool's memory must not be freed"


def test_no_new_agent_ends_the_process(never_freed: list[Any]) -> None:
    rig, _ = rig_with_a_stuck_read([], SOON)

    def refuse(agent: str) -> Any:
        raise OSError(f"no memory for {agent}")

    rig.plane._connections.factory = refuse
    assert "no memory for me.2" in rig.plane.died.result(5)
    assert rig.transport.closed and not unfreed()
