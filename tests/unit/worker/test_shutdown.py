"""The end of a worker: new calls are refused, calls inside end or continue elsewhere."""

from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import grpc
import pytest

from engine.base.errors import Unavailable
from engine.pb.diptych.internal.v1 import worker_pb2, worker_pb2_grpc
from kvtransfer.transport import ReadState
from tests.support.worker_pair import (
    Ask,
    PairedWorker,
    assert_at_rest,
    collect,
    decode_stub,
    pair,
    until,
)
from worker.shutdown import Orders

pytestmark = pytest.mark.timeout(60)
LONG = tuple(range(41))


def _begin(
    d: PairedWorker, p: PairedWorker | None, ask: Ask
) -> tuple[asyncio.Task[None], list[int]]:
    tokens: list[int] = []
    call = decode_stub(d).Decode(ask.pb(p))
    return asyncio.create_task(collect(call, tokens)), tokens


async def test_calls_inside_finish_and_new_ones_are_refused() -> None:
    async with pair() as (p, d):
        d.runner.before_step = lambda: time.sleep(0.005)
        ask = Ask(LONG, 30)
        reading, tokens = _begin(d, p, ask)
        await until(lambda: bool(tokens))
        draining = asyncio.create_task(d.host.calls.drain(20, asyncio.Event()))
        await until(lambda: d.host.calls.draining)
        with pytest.raises(Unavailable, match="draining"):
            await collect(decode_stub(d).Decode(ask.pb(p)), [])
        await asyncio.wait_for(draining, 10)
        await asyncio.wait_for(reading, 1)
        assert tokens == ask.answer()
        await assert_at_rest(p, d)


@pytest.mark.parametrize("how", ["deadline", "second signal"])
async def test_calls_that_do_not_finish_continue_elsewhere(how: str) -> None:
    async with pair() as (p, d):
        d.runner.before_step = lambda: time.sleep(0.05)
        ask, hurry = Ask(LONG, 60), asyncio.Event()
        reading, tokens = _begin(d, p, ask)
        await until(lambda: bool(tokens))
        draining = asyncio.create_task(d.host.calls.drain(0.1 if how == "deadline" else 30, hurry))
        await asyncio.sleep(0.05)
        if how == "second signal":
            hurry.set()
        with pytest.raises(Unavailable, match="goes on elsewhere"):
            await asyncio.wait_for(reading, 2)
        await asyncio.wait_for(draining, 2)
        assert 0 < len(tokens) < 60
        assert tokens == ask.answer()[: len(tokens)]
        await assert_at_rest(p, d)


async def test_a_prefill_worker_waits_until_its_blocks_are_read() -> None:
    async with pair() as (p, d):
        d.transport.gate = lambda read: ReadState.PENDING
        ask = Ask(LONG, 3)
        reading, tokens = _begin(d, p, ask)
        await until(lambda: bool(d.transport.pending))
        draining = asyncio.create_task(p.host.calls.drain(20, asyncio.Event()))
        await asyncio.sleep(1.2)
        assert not draining.done(), "blocks are leased"
        d.transport.gate = lambda read: ReadState.DONE
        await asyncio.wait_for(reading, 5)
        await asyncio.wait_for(draining, 2)
        assert tokens == ask.answer()
        await assert_at_rest(p, d)


async def test_a_prefill_worker_hands_over_leases_that_are_not_released() -> None:
    async with pair() as (p, _):
        stub = worker_pb2_grpc.PrefillServiceStub(p.host.channels.get(p.address))
        request = worker_pb2.PrefillRequest(caller_incarnation="me", token_ids=LONG[:40])
        call: Any = stub.Prefill(request)
        while not (await call.read()).HasField("finished"):
            pass
        draining = asyncio.create_task(p.host.calls.drain(0.1, asyncio.Event()))
        with pytest.raises(grpc.aio.AioRpcError, match="goes on elsewhere"):
            while (await call.read()) is not grpc.aio.EOF:
                pass
        await asyncio.wait_for(draining, 2)
        await assert_at_rest(p, timeout_s=2)


async def test_the_first_order_holds() -> None:
    orders = Orders(20.0)
    orders.drain(3.0)
    assert orders.stop.is_set()
    orders.drain(50.0)
    assert orders.drain_s == 3.0
    assert not orders.hurry.is_set()
    orders.signalled()
    assert orders.hurry.is_set(), "a signal after that is the second order"
    assert Orders(20.0).drain_s == 20.0


async def test_a_second_ctrl_c_ends_with_its_status() -> None:
    for number, once, twice in ((signal.SIGINT, 0, 130), (signal.SIGTERM, 0, 0)):
        orders = Orders(20.0)
        orders.signalled(number)
        assert orders.stop.is_set()
        assert orders.exit_status == once
        orders.signalled(number)
        assert orders.hurry.is_set()
        assert orders.exit_status == twice
        assert orders.interrupted == (number == signal.SIGINT)
