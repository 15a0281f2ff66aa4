"""However a Prefill call ends, every announced block is given back."""

from __future__ import annotations

import asyncio
import threading
import time

import grpc
import pytest

from engine.base.errors import Silent
from engine.base.option_groups import TransferOptions
from engine.pb.diptych.internal.v1 import worker_pb2, worker_pb2_grpc
from engine.rpc.liveness import next_message
from prefill.service import PrefillServicer
from tests.support.engine_probe import Probe
from tests.support.worker_pair import PairedWorker, assert_at_rest, pair, until

pytestmark = pytest.mark.timeout(60)
PROMPT = tuple(range(40))


def prefill(p: PairedWorker, owner: str = "me", held: int = 0) -> worker_pb2.PrefillRequest:
    return worker_pb2.PrefillRequest(
        request_id="r",
        incarnation=p.host.incarnation,
        caller_incarnation=owner,
        token_ids=PROMPT,
        num_held_blocks=held,
    )


class _Context:
    """What the service uses of a gRPC context."""

    def time_remaining(self) -> None:
        return None


async def test_a_caller_that_goes_before_the_last_message_leaves_no_lease() -> None:
    """The engine finished, and its last event was not read: leases do not wait for their TTL."""
    async with pair() as (p, _):
        service = PrefillServicer(p.host)
        call = service.Prefill(prefill(p), _Context())
        while True:
            response = await anext(call)
            if response.HasField("finished"):
                break
        assert p.pool().num_held == 10
        await call.aclose()
        await assert_at_rest(p, timeout_s=2)


async def test_a_call_lasts_as_long_as_its_leases() -> None:
    """After the last chunk it sends Alive until all leases are released."""
    async with pair() as (p, _):
        stub = worker_pb2_grpc.PrefillServiceStub(p.host.channels.get(p.address))
        kv = worker_pb2_grpc.KvServiceStub(p.host.channels.get(p.address))
        call, leases = stub.Prefill(prefill(p)), []
        while not (response := await call.read()).HasField("finished"):
            leases.append(response.ready.lease)
        after = [(await call.read()).WhichOneof("event") for _ in range(2)]
        assert after == ["alive", "alive"]
        assert p.pool().num_held == 10
        first = worker_pb2.ReleaseRequest(caller_incarnation="me", leases=leases[:1])
        await kv.Release(first)
        assert (await call.read()).HasField("alive"), "others are left"
        await kv.Release(worker_pb2.ReleaseRequest(caller_incarnation="me", leases=leases))
        while (last := await call.read()) is not grpc.aio.EOF:
            assert last.HasField("alive")
        await assert_at_rest(p, timeout_s=1)


async def test_a_caller_that_goes_after_the_last_message_leaves_no_lease() -> None:
    async with pair() as (p, _):
        stub = worker_pb2_grpc.PrefillServiceStub(p.host.channels.get(p.address))
        call = stub.Prefill(prefill(p))
        while not (await call.read()).HasField("finished"):
            pass
        assert p.pool().num_held == 10
        call.cancel()
        await assert_at_rest(p, timeout_s=1)


async def test_a_call_ends_when_its_leases_have_run_out() -> None:
    async with pair({"transfer": TransferOptions(lease_ttl_s=0.3)}) as (p, _):
        stub = worker_pb2_grpc.PrefillServiceStub(p.host.channels.get(p.address))
        async with asyncio.timeout(5):
            kinds = [r.WhichOneof("event") async for r in stub.Prefill(prefill(p))]
        assert "finished" in kinds
        await assert_at_rest(p, timeout_s=1)


async def test_an_engine_that_hangs_sends_no_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop turns, the step does not end: neither Alive nor a heartbeat is sent."""
    monkeypatch.setattr("engine.step.engine_thread.STUCK_S", 0.2)
    gate = threading.Event()
    async with pair() as (p, _):
        p.runner.before_step = lambda: _wait_for(gate)
        stub = worker_pb2_grpc.PrefillServiceStub(p.host.channels.get(p.address))
        call = stub.Prefill(prefill(p))
        with pytest.raises(Silent, match="p has sent nothing"):
            await next_message(call, "p", silence_s=1.5)
        assert p.host.load() is None
        gate.set()
        await assert_at_rest(p, timeout_s=2)
        assert p.host.load() is not None


@pytest.mark.parametrize("num_read", range(6))
async def test_a_caller_that_goes_at_any_message(num_read: int) -> None:
    async with pair() as (p, _):
        p.runner.before_step = lambda: time.sleep(0.01)
        stub = worker_pb2_grpc.PrefillServiceStub(p.host.channels.get(p.address))
        call = stub.Prefill(prefill(p))
        for _ in range(num_read):
            await call.read()
        call.cancel()
        await assert_at_rest(p, timeout_s=1)


async def test_pins_are_given_back_also_when_the_engine_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine that does not answer in time (a stopped process) still applies operations."""
    monkeypatch.setattr("engine.step.engine_thread.CALL_TIMEOUT_S", 0.05)
    async with pair() as (p, _):
        service = PrefillServicer(p.host)
        call = service.Prefill(prefill(p), _Context())
        await anext(call)
        gate = threading.Event()
        await until(lambda: not p.host.engine._streams)  # all is announced
        p.host.engine.post(Probe(lambda core: _wait_for(gate)))
        held = asyncio.create_task(p.host.blocks.hold([]))
        await call.aclose()
        await asyncio.sleep(0.2)
        monkeypatch.undo()
        gate.set()
        await asyncio.gather(held, return_exceptions=True)
        await assert_at_rest(p, timeout_s=2)


async def test_a_hold_that_came_too_late_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.step.engine_thread.CALL_TIMEOUT_S", 0.05)
    async with pair() as (p, _):
        service = PrefillServicer(p.host)
        hashes: list[bytes] = []
        call = service.Prefill(prefill(p), _Context())
        async for response in call:
            hashes += response.ready.hashes
            if response.HasField("finished"):
                break
        await call.aclose()
        await assert_at_rest(p)
        gate = threading.Event()
        p.host.engine.post(Probe(lambda core: _wait_for(gate)))
        with pytest.raises(TimeoutError):
            await p.host.blocks.hold(hashes)
        monkeypatch.undo()
        gate.set()
        assert await p.host.engine.call(Probe(lambda core: core.pool.num_held)) == 10, "it ran"
        await assert_at_rest(p, timeout_s=2)


def _wait_for(gate: threading.Event) -> None:
    assert gate.wait(5)
