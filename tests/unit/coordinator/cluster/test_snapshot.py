"""A snapshot is built once for many readers, and each change shows in the next one."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from coordinator.cluster.incidents import PENALTY_S
from coordinator.cluster.membership import Membership
from coordinator.cluster.table import WorkerTable
from coordinator.cluster.worker import (
    FORGET_S,
    SILENCE_S,
    Hello,
    Load,
    Worker,
    WorkerState,
)
from engine.base.types import PROTOCOL_VERSION, Health, Peer, Role
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from tests.support.fake_decode import identity


class Table:
    """A table in a time of its own; its snapshot is read (and cached) after each registration."""

    def __init__(self) -> None:
        self.now = 100.0
        self.open = ExitStack()
        metrics = CoordinatorMetrics(CollectorRegistry(), "smollm2")
        self.members = Membership("smollm2", 49152, metrics, lambda: self.now)

    def register(self, name: str, role: Role = Role.DECODE, incarnation: str = "") -> Worker:
        peer = Peer(name, incarnation or f"of-{name}", "127.0.0.1:1")
        hello = Hello(peer, role, "", identity(), PROTOCOL_VERSION)
        worker = self.members.register(hello)
        self.members.snapshot()
        return worker

    def row(self, name: str) -> Worker | None:
        rows = [w for w in self.members.snapshot() if w.peer.worker_id == name]
        return rows[0] if rows else None


def test_one_tuple_serves_many_readers_until_something_changes():
    table = Table()
    table.register("d0")
    worker = table.register("d1")
    rows = table.members.snapshot()
    table.now += 1.0
    assert table.members.snapshot() is rows
    view = table.members.view()
    assert (view.workers, view.now_s) == (rows, table.now)
    table.members.heartbeat(worker, Load())
    assert table.members.snapshot() is not rows


Change = Callable[[Table, Worker], object]
CHANGES: dict[str, tuple[Change, Callable[[Worker | None], object]]] = {
    "load": (
        lambda t, w: t.members.heartbeat(w, Load(num_running=3)),
        lambda row: row.load.num_running == 3,
    ),
    "draining": (
        lambda t, w: t.members.heartbeat(w, Load(draining=True)),
        lambda row: row.state is WorkerState.DRAINING,
    ),
    "health": (
        lambda t, w: t.members.heartbeat(w, Load(health=Health.DEGRADED)),
        lambda row: row.is_degraded(100.0),
    ),
    "sick": (
        lambda t, w: t.members.heartbeat(w, Load(health=Health.SICK)),
        lambda row: row.is_sick,
    ),
    "stalled": (
        lambda t, w: t.members.stalled("d1", "of-d1", 2.0),
        lambda row: row.stalled_s == 100.0,
    ),
    "lost": (
        lambda t, w: t.members.lost(w, "killed"),
        lambda row: row.state is WorkerState.SUSPECT,
    ),
    "left": (
        lambda t, w: t.members.left(w),
        lambda row: row.state is WorkerState.SUSPECT,
    ),
    "ended": (
        lambda t, w: (t.members.heartbeat(w, Load(draining=True)), t.members.left(w)),
        lambda row: row is None,
    ),
    "penalized": (
        lambda t, w: t.members.penalize(w),
        lambda row: row.is_degraded(100.0),
    ),
    "assigned": (
        lambda t, w: t.open.enter_context(t.members.assigned(w, 30)),
        lambda row: (row.assigned_requests, row.assigned_tokens) == (1, 30),
    ),
    "another process": (
        lambda t, w: t.members.register(
            Hello(Peer("d1", "new", "127.0.0.1:1"), Role.DECODE, "", identity(), PROTOCOL_VERSION)
        ),
        lambda row: row.peer.incarnation == "new",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_shows_at_once(name: str):
    change, shows = CHANGES[name]
    table = Table()
    table.register("d0")
    worker = table.register("d1")
    before = table.members.snapshot()
    assert not shows(table.row("d1"))
    change(table, worker)
    assert shows(table.row("d1"))
    beside = [w for w in before if w.peer.worker_id == "d0"]
    assert [w for w in table.members.snapshot() if w.peer.worker_id == "d0"] == beside
    assert before[1] == worker, "a snapshot that was taken is a value"


def test_a_worker_is_ready_and_in_order_at_once():
    table = Table()
    for name in ("d2", "d0", "d1"):
        table.register(name)
        assert table.row(name).state is WorkerState.READY
    assert [w.peer.worker_id for w in table.members.snapshot()] == ["d0", "d1", "d2"]


def test_assigned_work_that_is_over_shows_at_once():
    table = Table()
    worker = table.register("d0")
    with table.members.assigned(worker, 30):
        assert table.row("d0").assigned_tokens == 30
    assert table.row("d0").assigned_tokens == 0


def test_proofs_of_wrong_computation_show_at_once():
    table = Table()
    worker = table.register("d0")
    for _ in range(3):
        table.members.accuse(worker, worker)
        table.members.heartbeat(worker, Load())
        table.now += PENALTY_S
        sick_before = table.row("d0").is_sick if table.row("d0") else None
    assert sick_before


def test_silence_and_forgetting_show_without_an_event():
    """No method is called in between; the clock alone moves, and no change was made before."""
    table = Table()
    worker = table.register("d0")
    table.now += SILENCE_S
    assert table.row("d0").state is WorkerState.READY
    table.now += 0.001
    assert table.row("d0").state is WorkerState.SUSPECT
    assert not table.members.ready(Role.DECODE)
    table.now += FORGET_S
    assert table.row("d0") is not None
    table.now += 0.001
    assert table.row("d0") is None
    assert not table.members.heartbeat(worker, Load())


def test_a_penalty_ends_without_an_event():
    table = Table()
    worker = table.register("d0")
    table.members.penalize(worker)
    row = table.row("d0")
    table.now += PENALTY_S / 2
    table.members.heartbeat(worker, Load())
    assert table.row("d0").is_degraded(table.members.view().now_s)
    table.now += PENALTY_S / 2
    view = table.members.view()
    assert not view.workers[0].is_degraded(view.now_s)
    assert row.is_degraded(row.penalized_until_s - PENALTY_S / 2), "the row itself holds no result"


def test_a_penalty_is_as_long_as_the_option():
    table = Table()
    table.members.penalty_s = 1.5
    table.members.penalize(table.register("d0"))
    assert table.row("d0").is_degraded(table.now + 1.4)
    assert not table.row("d0").is_degraded(table.now + 1.5)


def test_a_stall_that_is_not_reported_again_ends_as_silence():
    table = Table()
    table.register("d0")
    for _ in range(4):
        table.now += 1.0
        table.members.stalled("d0", "of-d0", 2.0)
    view = table.members.view()
    assert view.workers[0].state is WorkerState.READY
    assert view.workers[0].is_degraded(view.now_s)
    table.now += SILENCE_S + 0.001
    assert table.row("d0").state is WorkerState.SUSPECT


def test_random_changes_give_what_a_table_without_a_cache_has():
    """The rows are kept beside in a plain dictionary, and sorted and searched for each look."""
    rng = random.Random(20261201)
    table, rows, now_s = WorkerTable(), {}, 0.0
    proto = Table().register("x")
    num_expired = 0
    for _ in range(5_000):
        name, action = f"w{rng.randrange(8)}", rng.random()
        if action < 0.6:
            rows[name] = replace(
                proto,
                peer=Peer(name, f"i{rng.randrange(3)}", "a"),
                state=rng.choice(tuple(WorkerState)),
                heard_s=now_s,
                stalled_s=now_s - rng.choice((0.0, 1.0, 100.0)),
                load=Load(num_running=rng.randrange(3)),
            )
            table.put(rows[name])
        elif action < 0.7 and name in rows:
            del rows[name]
            table.remove(name)
        elif action < 0.9:
            now_s += rng.choice((0.1, 1.0, SILENCE_S))
        expected = [row for _, row in sorted(rows.items())]
        assert list(table.snapshot()) == expected
        expired = table.expired(now_s)
        assert expired == [row for row in expected if now_s > row.expires_s]
        num_expired += len(expired)
        assert table.get(name) is rows.get(name)
    assert num_expired > 1_000
