"""Which workers are found sick, and what all workers do then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from coordinator.api.grpc.admin import _row
from coordinator.cluster.incidents import INCIDENT_S, PENALTY_S, STRIKES, STRIKES_S
from coordinator.cluster.membership import Membership
from coordinator.cluster.registry_service import RegistryServicer
from coordinator.cluster.worker import Hello, Load, Worker
from coordinator.commands.status import state_cell
from coordinator.generation.dispatch import Dispatch
from coordinator.routing.policy import least_loaded
from coordinator.routing.retry import Retry
from engine.base.errors import Unavailable
from engine.base.types import PROTOCOL_VERSION, Health, ModelIdentity, Peer, Role
from engine.pb.diptych.internal.v1 import registry_pb2
from engine.rpc.status import from_rpc_error, to_status
from engine.telemetry.coordinator_metrics import CoordinatorMetrics

MODEL = ModelIdentity(
    name="m", digest="d", numeric_profile="p", max_model_len=100, block_size=4, vocab_size=50
)


class Table:
    """Two workers of each role, and a clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.registry = CollectorRegistry()
        metrics = CoordinatorMetrics(self.registry, "m")
        self.members = Membership("m", 50, metrics, lambda: self.now)
        self.sick: list[str] = []
        self.members.on_sick = lambda worker: self.sick.append(worker.peer.worker_id)
        for role in Role:
            for i in range(2):
                name = f"{role.value}-{i}"
                peer = Peer(name, f"{name}-x", "127.0.0.1:1")
                self.members.register(Hello(peer, role, "", MODEL, PROTOCOL_VERSION))

    def worker(self, name: str) -> Worker:
        return next(w for w in self.members.snapshot() if w.peer.worker_id == name)

    def beat(self, health: Health = Health.OK, of: str = "") -> None:
        for worker in self.members.snapshot():
            mine = health if worker.peer.worker_id == of else Health.OK
            self.members.heartbeat(worker, Load(health=mine))

    def accuse(self, name: str, witness: str = "") -> None:
        self.members.accuse(self.worker(name), self.worker(witness or name))

    def pass_time(self, seconds: float) -> None:
        for _ in range(round(seconds)):
            self.now += 1.0
            self.beat()

    def dispatch(self) -> Dispatch:
        deadline_s = self.now + 60
        retry = Retry(least_loaded, self.members, worker_wait_s=1.0, deadline_s=deadline_s)
        return Dispatch(retry, self.members, clock=lambda: self.now)


@pytest.fixture(autouse=True)
def _no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coordinator.routing.retry.FIRST_BACKOFF_S", 0.0)


def test_a_degraded_worker_is_the_last_choice_and_no_more() -> None:
    table = Table()
    table.beat(Health.DEGRADED, "decode-0")
    assert table.worker("decode-0").is_degraded(table.now)
    assert not table.sick
    table.beat()
    assert not table.worker("decode-0").is_degraded(table.now)


def test_operators_see_health() -> None:
    table = Table()

    def shown() -> tuple[str, str]:
        row = _row(table.worker("decode-0"), table.now)
        return row.health, state_cell(row)

    assert shown() == ("ok", "[green]ready[/green]")
    table.beat(Health.DEGRADED, "decode-0")
    assert shown() == ("degraded", "[yellow]ready, degraded[/]")
    for _ in range(STRIKES):
        table.pass_time(INCIDENT_S + 1)
        table.accuse("decode-0")
    assert shown() == ("sick", "[red]ready, sick[/]")


def test_a_failed_self_test_is_enough_and_counts_once() -> None:
    table = Table()
    for _ in range(3):
        table.beat(Health.SICK, "prefill-1")
    assert table.sick == ["prefill-1"]
    assert table.worker("prefill-1").is_degraded(table.now)
    labels = {"model_name": "m", "worker": "prefill-1"}
    assert table.registry.get_sample_value("diptych_sick_workers_total", labels) == 1


def test_proofs_of_one_moment_are_one_and_old_ones_do_not_count() -> None:
    table = Table()
    worker = table.worker("decode-0")
    for _ in range(40):
        table.members.accuse(worker, worker)
    assert not table.sick
    table.pass_time(INCIDENT_S + 1)
    table.members.accuse(worker, worker)
    table.pass_time(STRIKES_S + 1)
    for _ in range(STRIKES - 1):
        table.members.accuse(worker, worker)
        table.pass_time(INCIDENT_S + 1)
    assert not table.sick
    old = replace(worker, peer=replace(worker.peer, incarnation="older"))
    table.members.accuse(old, old)
    assert not table.sick
    table.members.accuse(worker, worker)
    assert table.sick == ["decode-0"]


async def attempts(table: Table, *, elsewhere: bool) -> None:
    """One request that the worker it goes to gives up as not finite, and then another."""
    dispatch = table.dispatch()
    error = Unavailable("not finite", sick=True)
    route = await dispatch.next(10)
    await dispatch.failed(route, error)
    if elsewhere:
        again = await dispatch.next(10)
        assert again.decode.peer != route.decode.peer
        dispatch.retry.progressed()
        dispatch.retry.progressed()


async def test_a_worker_that_could_not_compute_what_another_could_is_accused() -> None:
    table = Table()
    for _ in range(2 * STRIKES):  # each worker is avoided after its failure: the two take turns
        await attempts(table, elsewhere=True)
        table.pass_time(PENALTY_S + 1)
    assert table.sick


async def test_a_request_that_fails_everywhere_makes_no_worker_sick() -> None:
    table = Table()
    for _ in range(3 * STRIKES):
        dispatch = table.dispatch()
        for _ in range(3):
            await dispatch.failed(await dispatch.next(10), Unavailable("not finite", sick=True))
        table.pass_time(PENALTY_S + 1)
    assert not table.sick


async def damaged_blocks(table: Table, *, of: str = "", found_by: str = "") -> None:
    """A request whose first attempt meets damaged blocks, where it is at these workers."""
    dispatch = table.dispatch()
    while True:
        route = await dispatch.next(10)
        if route.prefill is None or not route.prefill.peer.worker_id.startswith(of):
            break
        if not route.decode.peer.worker_id.startswith(found_by):
            break
        await dispatch.failed(route, Unavailable("damaged", lost="prefill", sick=True))
    dispatch.retry.progressed()
    table.pass_time(PENALTY_S + 1)


async def test_a_prefill_worker_is_accused_for_its_blocks() -> None:
    """Also where one decode worker has found all of them."""
    table = Table()
    for _ in range(3 * STRIKES):
        await damaged_blocks(table, of="prefill-0")
    assert table.sick == ["prefill-0"]


async def test_a_decode_worker_in_which_blocks_of_all_are_damaged() -> None:
    """Its memory is bad where its self-test does not look: its peers are not sick."""
    table = Table()
    for _ in range(3 * STRIKES):
        await damaged_blocks(table, found_by="decode-0")
    assert table.sick == ["decode-0"]


async def test_a_request_leaves_a_decode_worker_in_which_all_blocks_are_damaged() -> None:
    table = Table()
    dispatch = table.dispatch()
    first = await dispatch.next(10)
    for _ in range(2):
        route = await dispatch.next(10)
        assert route.decode.peer == first.decode.peer
        await dispatch.failed(route, Unavailable("damaged", lost="prefill", sick=True))
    assert (await dispatch.next(10)).decode.peer != first.decode.peer


class _Call(Exception):
    """What a caller sees of a status."""

    def __init__(self, error: Unavailable) -> None:
        self._status = to_status(error)

    def code(self) -> Any:
        return self._status.code

    def details(self) -> str:
        return self._status.message

    def trailing_metadata(self) -> Any:
        return self._status.trailing_metadata


@pytest.mark.parametrize("sick", [True, False])
def test_sickness_travels_with_the_status(sick: bool) -> None:
    error: Any = _Call(Unavailable("x", lost="prefill", sick=sick))
    back = from_rpc_error(error)
    assert isinstance(back, Unavailable)
    assert (back.sick, back.lost) == (sick, "prefill")


async def test_all_others_forget_a_sick_worker_and_it_ends() -> None:
    members = Membership("m", 50, CoordinatorMetrics(CollectorRegistry(), "m"))
    servicer = RegistryServicer(members, "c")

    def messages(name: str, queue: asyncio.Queue[Any]) -> AsyncIterator[Any]:
        async def stream() -> AsyncIterator[Any]:
            hello = registry_pb2.Hello(
                worker_id=name,
                incarnation=f"{name}-x",
                address="127.0.0.1:1",
                role=registry_pb2.ROLE_PREFILL,
                protocol_version=PROTOCOL_VERSION,
                model=registry_pb2.ModelIdentity(
                    name="m", max_model_len=100, block_size=4, vocab_size=50
                ),
            )
            yield registry_pb2.WorkerMessage(hello=hello)
            while (load := await queue.get()) is not None:
                yield registry_pb2.WorkerMessage(load=load)

        return stream()

    queues = {name: asyncio.Queue[Any]() for name in "abc"}
    streams = {n: servicer.Register(messages(n, queues[n]), None) for n in "ab"}
    for stream in streams.values():
        assert (await anext(stream)).HasField("welcome")
    nexts = {name: asyncio.ensure_future(anext(s)) for name, s in streams.items()}
    await asyncio.sleep(0)
    queues["a"].put_nowait(registry_pb2.Load(health=registry_pb2.HEALTH_SICK))
    async with asyncio.timeout(5):
        assert (await nexts["b"]).forget.incarnation == "a-x"
        assert (await nexts["a"]).drain.deadline_s > 0
    late = servicer.Register(messages("c", queues["c"]), None)
    assert (await anext(late)).HasField("welcome")
    assert (await anext(late)).forget.incarnation == "a-x"
    for stream in (*streams.values(), late):
        await stream.aclose()
