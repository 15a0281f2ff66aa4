"""Every held block is shown with its owner, at any moment; a block without one is unexplained."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from typing import Any

import pytest

from engine.base.option_groups import TransferOptions
from engine.pb.diptych.internal.v1 import worker_pb2, worker_pb2_grpc
from kvtransfer.transport import ReadState
from tests.support.engine_probe import Probe
from tests.support.worker_pair import (
    Ask,
    PairedWorker,
    answer,
    assert_at_rest,
    collect,
    decode_stub,
    pair,
    random_ask,
    until,
)

pytestmark = pytest.mark.timeout(60)
LONG = tuple(range(41))  # ten whole blocks, two a chunk


async def report(worker: PairedWorker) -> dict[str, Any]:
    """The report as an operator reads it: JSON."""
    found: dict[str, Any] = json.loads(json.dumps(await worker.host.holds.report()))
    for hold in found["holds"]:
        assert hold["owner"] and hold["reason"] and hold["age_s"] >= 0, hold
        assert hold["deadline_s"] is not None or hold["note"], hold
    return found


def of_kind(found: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [hold for hold in found["holds"] if hold["kind"] == kind]


async def test_at_rest_nothing_is_held() -> None:
    async with pair() as (p, d):
        assert await answer(d, p, Ask(LONG, 3)) == Ask(LONG, 3).answer()
        await assert_at_rest(p, d)
        for worker in (p, d):
            found = await report(worker)
            assert found["holds"] == []
            pool = found["pool"]
            assert pool["free"] + pool["cached"] == pool["total"] == 64
            assert pool["held"] == pool["unexplained"] == 0
            assert found["data_plane"]["agent"] == f"{worker.host.incarnation}.1"


async def test_while_a_chunk_is_being_read() -> None:
    async with pair() as (p, d):
        d.transport.gate = lambda read: ReadState.PENDING
        call = decode_stub(d).Decode(Ask(LONG, 3).pb(p), timeout=20)
        reading = asyncio.create_task(collect(call, []))
        await until(lambda: len(p.host.kv.table.all) == 5 and bool(d.transport.pending))
        at_d, at_p = await report(d), await report(p)

        (request,) = of_kind(at_d, "request")
        assert (request["owner"], request["num_blocks"]) == ("r", 11)
        assert "fetching" in request["reason"] and 15 < request["deadline_s"] < 20.5
        (pull,) = of_kind(at_d, "pull")
        assert (pull["owner"], pull["num_blocks"], pull["peer"]) == ("r", 2, p.host.incarnation)
        assert 15 < pull["deadline_s"] < 20.5, "the request's own is nearer than --pull-timeout-s"
        assert of_kind(at_d, "task"), "the fetch runs beside its call"
        assert at_d["pool"]["held"] == 11 and at_d["pool"]["unexplained"] == 0

        leases = of_kind(at_p, "lease")
        assert sum(lease["num_blocks"] for lease in leases) == 10
        assert {lease["owner"] for lease in leases} == {d.host.incarnation}
        assert {lease["request_id"] for lease in leases} == {"r"}
        assert all(0 < lease["deadline_s"] <= 20 for lease in leases)
        assert at_p["pool"]["held"] == 10 and at_p["pool"]["unexplained"] == 0
        text = json.dumps(at_p)
        assert not any(lease.id.hex() in text for lease in p.host.kv.table.all), "a secret"

        d.transport.gate = lambda read: ReadState.DONE
        await reading
        await assert_at_rest(p, d)
        assert (await report(d))["holds"] == (await report(p))["holds"] == []


async def test_a_quarantined_read_is_shown_with_its_end() -> None:
    options = TransferOptions(pull_timeout_s=0.1, quarantine_s=60)
    async with pair(decode={"transfer": options}) as (p, d):
        d.transport.gate = lambda read: ReadState.PENDING
        with pytest.raises(Exception, match="no end after"):
            await collect(decode_stub(d).Decode(Ask(LONG, 3).pb(p), timeout=20), [])
        await until(lambda: d.pool().num_held == 2)
        found = await report(d)
        (hold,) = of_kind(found, "quarantine")
        assert (hold["owner"], hold["num_blocks"]) == ("r", 2)
        assert "starts anew" in hold["reason"] and 50 < hold["deadline_s"] <= 60
        assert not of_kind(found, "request"), "the request itself is over"
        assert found["pool"]["held"] == 2 and found["pool"]["unexplained"] == 0
        assert found["data_plane"]["quarantined_blocks"] == 2
        d.transport.gate = lambda read: ReadState.DONE
        await assert_at_rest(p, d)


async def test_a_block_without_an_owner_is_unexplained() -> None:
    async with pair() as (p, _):
        (lost,) = await p.host.engine.call(Probe(lambda core: core.pool.take(1)))
        found = await report(p)
        assert found["pool"]["unexplained"] == 1
        assert found["pool"]["unexplained_blocks"] == [lost]
        await p.host.engine.call(Probe(lambda core: core.unpin([lost])))
        assert (await report(p))["pool"]["unexplained"] == 0


async def test_an_announcement_that_is_not_read_is_shown() -> None:
    """A caller that does not read: what the engine pinned for it waits in its stream."""
    async with pair() as (p, _):
        with p.host.calls.serving(_prompt(p)) as stream:
            await until(lambda: len(stream.undelivered) == 5)
            found = await report(p)
            holds = of_kind(found, "announcement")
            assert sum(hold["num_blocks"] for hold in holds) == 10
            assert {hold["owner"] for hold in holds} == {"r"}
            assert all(hold["deadline_s"] is None and hold["note"] for hold in holds)
            assert found["pool"]["held"] == 10 and found["pool"]["unexplained"] == 0
            for event in await stream.drain():
                await p.host.blocks.unpin(getattr(event, "block_ids", []))
        await assert_at_rest(p)


def _prompt(p: PairedWorker) -> Any:
    from prefill.service import PrefillServicer

    request = worker_pb2.PrefillRequest(
        request_id="r", caller_incarnation="me", token_ids=LONG[:40]
    )
    return PrefillServicer(p.host)._engine_request(request, None)


async def test_a_request_that_waits_holds_no_block() -> None:
    async with pair(decode={"num_blocks": 12}) as (p, d):
        d.transport.gate = lambda read: ReadState.PENDING
        calls = [
            asyncio.create_task(collect(decode_stub(d).Decode(ask.pb(p), timeout=20), []))
            for ask in (Ask(LONG, 3), Ask(LONG[::-1], 3))
        ]
        await until(lambda: len(d.host.engine.core._requests) == 2 and bool(d.transport.pending))
        requests = of_kind(await report(d), "request")
        waiting = next(hold for hold in requests if "waiting" in hold["reason"])
        assert len(requests) == 2 and "num_blocks" not in waiting
        d.transport.gate = lambda read: ReadState.DONE
        await asyncio.gather(*calls)
        await assert_at_rest(p, d)


async def test_an_engine_that_does_not_answer_is_reported() -> None:
    async with pair() as (p, _):
        stub = worker_pb2_grpc.PrefillServiceStub(p.host.channels.get(p.address))
        request = worker_pb2.PrefillRequest(caller_incarnation="me", token_ids=LONG[:40])
        call = stub.Prefill(request)
        await until(lambda: len(p.host.kv.table.all) == 5)
        gate = threading.Event()
        p.host.engine.post(Probe(lambda core: _wait_for(gate)))
        begun = time.monotonic()
        found = await report(p)
        assert time.monotonic() - begun < 4
        assert found["pool"] == {"answers": False}
        assert len(of_kind(found, "lease")) == 5, "the other owners still report"
        gate.set()
        call.cancel()
        await assert_at_rest(p)
        assert (await report(p))["pool"]["unexplained"] == 0


def _wait_for(gate: threading.Event) -> None:
    assert gate.wait(20)


async def test_under_load_no_block_is_ever_unexplained() -> None:
    """Blocks pass between owners all the time (request, stream, lease, pull), beside cancels."""
    rng = random.Random(5)
    shared = [rng.randrange(50) for _ in range(24)]
    async with pair() as (p, d):
        asks = [random_ask(rng, shared, 60) for _ in range(60)]

        async def ask_all(mine: list[Ask]) -> None:
            for ask in mine:
                if rng.random() < 0.3:
                    call = decode_stub(d).Decode(ask.pb(p), timeout=20)
                    reading = asyncio.create_task(collect(call, []))
                    await asyncio.sleep(rng.random() * 0.02)
                    call.cancel()
                    await asyncio.gather(reading, return_exceptions=True)
                else:
                    assert await answer(d, p, ask) == ask.answer()

        loads = [asyncio.create_task(ask_all(asks[i::4])) for i in range(4)]
        num_busy = 0
        while not all(load.done() for load in loads):
            for worker in (p, d):
                pool = (await report(worker))["pool"]
                assert pool["unexplained"] == 0, pool
                num_busy += pool["held"] > 0
        await asyncio.gather(*loads)
        assert num_busy > 20
        await assert_at_rest(p, d)
