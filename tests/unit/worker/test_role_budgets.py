"""Every worker serves Prefill and Decode; its role is a pair of budgets that may change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from coordinator.cluster.membership import Membership
from coordinator.cluster.registry_service import RegistryServicer
from engine.base.errors import InvalidRequest, Unavailable
from engine.base.types import Peer, RoleBudgets
from engine.pb.diptych.internal.v1 import registry_pb2, worker_pb2, worker_pb2_grpc
from engine.rpc.registration import Registration
from engine.rpc.server import RpcServer
from engine.rpc.status import from_rpc_error
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from tests.support.history_model import VOCAB
from tests.support.worker_pair import (
    Ask,
    PairedWorker,
    answer,
    assert_at_rest,
    collect,
    decode_stub,
    pair,
    until,
)

pytestmark = pytest.mark.timeout(60)
LONG = tuple(range(41))  # ten whole blocks, two a chunk


async def set_budgets(worker: PairedWorker, prompt_tokens: int, answers: int) -> None:
    """As a coordinator's message does; returns when the engine has applied it."""
    budgets = RoleBudgets(prompt_tokens, answers)
    worker.host.set_role_budgets(budgets)
    await until(lambda: worker.host.role_budgets == budgets)


async def prefill(worker: PairedWorker) -> list[worker_pb2.PrefillResponse]:
    """Call Prefill with LONG's whole blocks; release nothing, end after the last chunk."""
    stub = worker_pb2_grpc.PrefillServiceStub(worker.host.channels.get(worker.address))
    request = worker_pb2.PrefillRequest(
        request_id="p", caller_incarnation="me", token_ids=LONG[:40]
    )
    responses = []
    call = stub.Prefill(request, timeout=20)
    try:
        async for response in call:
            responses.append(response)
            if response.HasField("finished"):
                break
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) or error from error
    finally:
        call.cancel()
    return responses


async def test_the_defaults_are_the_roles() -> None:
    async with pair() as (p, d):
        assert p.host.role_budgets == RoleBudgets(8, 0)
        assert d.host.role_budgets == RoleBudgets(0, 8)
        with pytest.raises(Unavailable, match="writes no answers: its budget is 0"):
            await collect(decode_stub(p).Decode(Ask(LONG, 3).pb(None)), [])
        with pytest.raises(Unavailable, match="computes no prompts for others: its budget is 0"):
            await prefill(d)
        assert await answer(d, None, Ask(LONG, 3)) == Ask(LONG, 3).answer(), "its own prompts"
        await assert_at_rest(p, d)


async def test_workers_that_change_their_roles_write_equal_tokens() -> None:
    async with pair() as (p, d):
        ask = Ask(LONG, 12)
        assert await answer(d, p, ask) == ask.answer()
        await set_budgets(p, 0, 8)
        await set_budgets(d, 8, 0)
        other = Ask(LONG[::-1], 12)
        request = other.pb(d)
        tokens: list[int] = []
        await collect(decode_stub(p).Decode(request, timeout=20), tokens)
        assert tokens == other.answer()
        assert p.host.plane.counters.num_blocks == 10, "pulled from the former decode worker"
        with pytest.raises(Unavailable, match="writes no answers"):
            await collect(decode_stub(d).Decode(ask.pb(None)), [])
        await assert_at_rest(p, d)


async def test_one_worker_with_both_budgets_serves_itself() -> None:
    async with pair() as (p, d):
        await set_budgets(p, 8, 8)
        await set_budgets(d, 8, 8)
        ask = Ask(LONG, 12)
        assert await answer(p, d, ask) == await answer(d, p, ask) == ask.answer()
        await assert_at_rest(p, d)


async def test_calls_inside_finish_when_a_budget_becomes_0() -> None:
    async with pair() as (p, d):
        p.runner.before_step = d.runner.before_step = lambda: time.sleep(0.01)
        ask, tokens = Ask(LONG, 30), []
        reading = asyncio.create_task(collect(decode_stub(d).Decode(ask.pb(p)), tokens))
        await until(lambda: p.runner.num_tokens > 0)
        await set_budgets(p, 0, 8)
        await until(lambda: bool(tokens))
        await set_budgets(d, 8, 0)
        await asyncio.wait_for(reading, 20)
        assert tokens == ask.answer()
        assert d.host.plane.counters.num_blocks == 10, "the prefill worker computed all of them"
        await assert_at_rest(p, d)


async def test_a_prefill_peer_without_a_budget_is_a_lost_route() -> None:
    """The coordinator then calls again with another peer, or with none."""
    async with pair() as (p, d):
        await set_budgets(p, 0, 8)
        with pytest.raises(Unavailable, match="budget is 0 tokens") as caught:
            await collect(decode_stub(d).Decode(Ask(LONG, 3).pb(p), timeout=20), [])
        assert caught.value.lost == "prefill"
        assert await answer(d, None, Ask(LONG, 3)) == Ask(LONG, 3).answer()
        await assert_at_rest(p, d)


async def test_budgets_above_the_limits_of_a_step_are_cut() -> None:
    async with pair() as (p, _):
        p.host.set_role_budgets(RoleBudgets(10**6, 10**6))
        await until(lambda: p.host.role_budgets == RoleBudgets(8, 8))


@asynccontextmanager
async def registered(worker: PairedWorker) -> AsyncIterator[tuple[RegistryServicer, Membership]]:
    """The worker's Register stream to a real registry."""
    membership = Membership("test", VOCAB, CoordinatorMetrics(CollectorRegistry(), "test"))
    registry, server = RegistryServicer(membership, "c"), RpcServer()
    server.add_service(registry_pb2.DESCRIPTOR.services_by_name["RegistryService"], registry)
    address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    await server.start()
    host = worker.host
    registration = Registration(
        coordinators=address,
        hello=host.hello("w", worker.address, ""),
        load=host.load,
        on_drain=lambda deadline_s: None,
        on_role_budgets=host.set_role_budgets,
    )
    registration.start()
    try:
        await until(lambda: registration.registered)
        yield registry, membership
    finally:
        await registration.stop()
        await server.stop()


async def test_a_coordinator_sets_the_budgets_and_reads_them_in_the_load() -> None:
    async with pair() as (p, _), registered(p) as (registry, membership):

        def reported() -> Any:
            return membership.snapshot()[0].load.role_budgets

        await until(lambda: reported() == RoleBudgets(8, 0))
        (row,) = membership.snapshot()
        registry.set_role_budgets(row, RoleBudgets(4, 2))
        await until(lambda: reported() == RoleBudgets(4, 2))
        assert await answer(p, None, Ask(LONG, 5)) == Ask(LONG, 5).answer()
        with pytest.raises(InvalidRequest, match="at least one above 0"):
            registry.set_role_budgets(row, RoleBudgets(0, 0))
        assert p.host.role_budgets == RoleBudgets(4, 2)
        await assert_at_rest(p)


async def test_a_worker_that_is_not_connected_cannot_be_changed() -> None:
    async with pair() as (p, _):
        async with registered(p) as (registry, membership):
            (row,) = membership.snapshot()
        with pytest.raises(Unavailable, match="not connected"):
            registry.set_role_budgets(row, RoleBudgets(4, 2))
        assert row.peer == Peer("w", p.host.incarnation, p.address)
