"""ReceiveBudget bounds received bytes, and cuts off slow requests for others."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

from engine.base.errors import Overloaded
from engine.pb.diptych.v1 import inference_pb2 as pb
from engine.rpc import receive_budget
from engine.rpc.channel import open_channel
from engine.rpc.receive_budget import Lease, ReceiveBudget
from engine.rpc.server import RpcServer

MIB = 1 << 20


async def hold(lease: Lease, size: int, grace_s: float | None = 60.0) -> None:
    """Receive `size` bytes without end."""
    try:
        async with asyncio.timeout(None) as limit:
            await lease.take(size, limit, grace_s)
            await asyncio.sleep(60)
    except TimeoutError:
        raise lease.refusal() from None
    finally:
        lease.keep(0)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive_budget, "WAIT_S", 0.3)


async def started(
    budget: ReceiveBudget, size: int, grace_s: float | None = 60.0, peer: str = ""
) -> asyncio.Task[None]:
    task = asyncio.create_task(hold(budget.lease(peer), size, grace_s))
    await asyncio.sleep(0.01)
    return task


async def ended(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_request_without_room_waits_and_is_then_refused() -> None:
    refused: list[int] = []
    budget = ReceiveBudget(10, lambda: refused.append(1))
    first = await started(budget, 7)
    with pytest.raises(Overloaded, match="7 bytes of requests are in flight, of at most 10") as it:
        await hold(budget.lease(), 4)
    assert it.value.retry_after_s > 0
    assert len(refused) == 1
    second = await started(budget, 3)
    assert budget.in_flight == 10
    await ended(first, second)
    assert budget.in_flight == 0


async def test_returned_room_goes_to_the_newest() -> None:
    budget = ReceiveBudget(10)
    first = await started(budget, 10)
    old, new = await started(budget, 10), await started(budget, 10)
    await ended(first)
    await asyncio.sleep(0.01)
    assert budget.in_flight == 10
    with pytest.raises(Overloaded):
        await old
    assert not new.done()
    await ended(new)
    assert budget.in_flight == 0


async def test_an_incomplete_request_is_cut_off_while_others_wait() -> None:
    budget = ReceiveBudget(10)
    slow, fresh = await started(budget, 5, grace_s=0.05), await started(budget, 5, grace_s=30)
    await asyncio.sleep(0.2)
    assert not slow.done()  # no other request needs the room
    third = await started(budget, 5)
    with pytest.raises(Overloaded, match="not complete in time"):
        await asyncio.wait_for(slow, 5)
    assert not third.done()
    assert not fresh.done()
    assert budget.in_flight == 10
    await ended(third, fresh)
    assert budget.in_flight == 0


async def test_no_more_are_cut_off_than_needed() -> None:
    budget = ReceiveBudget(12)
    slow = [await started(budget, 4, grace_s=0.0) for _ in range(3)]
    fresh = await started(budget, 4)
    await asyncio.sleep(0.05)
    assert [task.done() for task in slow] == [True, False, False]
    assert not fresh.done()
    await ended(*slow, fresh)
    assert budget.in_flight == 0


async def test_a_large_request_counts_while_it_is_served_a_small_one_does_not() -> None:
    budget = ReceiveBudget(4 * MIB)
    for size, kept in ((2 * MIB, 2 * MIB), (100, 0)):
        with budget.lease() as lease:
            async with asyncio.timeout(None) as limit:
                await lease.take(4 * MIB, limit)
            assert budget.in_flight == 4 * MIB
            lease.keep(size)
            assert budget.in_flight == kept
        assert budget.in_flight == 0


async def test_a_request_larger_than_the_budget_gets_all_of_it() -> None:
    budget = ReceiveBudget(10)
    task = await started(budget, 100)
    assert budget.in_flight == 10
    await ended(task)
    assert budget.in_flight == 0


async def test_a_cancelled_wait_takes_nothing() -> None:
    budget = ReceiveBudget(10)
    first = await started(budget, 10)
    waiting = await started(budget, 10)
    await ended(waiting)
    await ended(first)
    assert budget.in_flight == 0


async def test_a_request_being_parsed_is_not_cut_off() -> None:
    """Others wait for its room, and get it when it is returned."""
    budget = ReceiveBudget(10)
    lease = budget.lease()
    async with asyncio.timeout(None) as limit:
        await lease.take(10, limit, grace_s=0.0)
        lease.received()
    waiting = await started(budget, 10)
    await asyncio.sleep(0.1)
    assert not waiting.done()
    lease.keep(0)
    await asyncio.sleep(0.01)
    assert budget.in_flight == 10
    await ended(waiting)
    assert budget.in_flight == 0


async def test_a_message_that_arrived_while_the_loop_was_busy_is_not_cut_off() -> None:
    budget = ReceiveBudget(10)
    here = asyncio.get_running_loop().create_future()

    async def receive() -> None:
        with budget.lease() as lease:
            async with asyncio.timeout(None) as limit:
                await lease.take(10, limit, grace_s=0.05)
                await here
                lease.received()

    reading = asyncio.create_task(receive())
    await asyncio.sleep(0.01)
    waiting = await started(budget, 10)
    asyncio.get_running_loop().call_later(0.05, here.set_result, None)
    time.sleep(0.2)  # noqa: ASYNC251
    await asyncio.wait_for(reading, 5)
    await ended(waiting)
    assert budget.in_flight == 0


async def test_a_connection_that_fills_the_room_goes_behind_others() -> None:
    """Later requests of other connections go before its new ones."""
    budget = ReceiveBudget(10)
    slow = await started(budget, 10, grace_s=0.0, peer="1.1.1.1:1")
    again = await started(budget, 10, grace_s=0.1, peer="1.1.1.1:1")
    with pytest.raises(Overloaded):
        await asyncio.wait_for(slow, 5)
    other = await started(budget, 10, peer="1.1.1.1:2")
    newest = await started(budget, 10, peer="1.1.1.1:1")
    with pytest.raises(Overloaded, match="not complete in time"):
        await asyncio.wait_for(again, 5)
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded, match="10 bytes of requests are in flight"):
        await asyncio.wait_for(newest, 5)
    assert not other.done()
    await ended(other)
    assert budget.in_flight == 0


async def test_a_connection_with_complete_requests_goes_before_a_new_one() -> None:
    budget = ReceiveBudget(10)
    with budget.lease("1.1.1.1:1") as lease:
        async with asyncio.timeout(None) as limit:
            await lease.take(10, limit)
        lease.keep(5)
    holding = await started(budget, 10)
    known, new = await started(budget, 10, peer="1.1.1.1:1"), await started(budget, 10, peer="x:1")
    await ended(holding)
    with pytest.raises(Overloaded):
        await new
    assert not known.done()
    await ended(known)


async def test_an_address_with_many_cut_offs_has_less_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive_budget, "GRACE_S", 60.0)
    monkeypatch.setattr(receive_budget, "SHORT_GRACE_S", 0.0)
    budget = ReceiveBudget(1)
    for i in range(16):
        slow = await started(budget, 1, grace_s=0.0, peer=f"1.1.1.1:{i}")
        other = await started(budget, 1, peer="2.2.2.2:1")
        with pytest.raises(Overloaded, match="not complete in time"):
            await asyncio.wait_for(slow, 5)
        await ended(other)
    late = await started(budget, 1, grace_s=None, peer="1.1.1.1:99")
    next_one = await started(budget, 1, peer="2.2.2.2:1")
    with pytest.raises(Overloaded, match="not complete in time"):
        await asyncio.wait_for(late, 5)
    assert not next_one.done()
    await ended(next_one)


class Echo:
    """Answers Detokenize with the number of ids."""

    async def Detokenize(self, request: pb.DetokenizeRequest, context: object) -> object:
        return pb.DetokenizeResponse(text=str(len(request.token_ids)))

    def __getattr__(self, name: str) -> object:
        return self.Detokenize


async def test_incomplete_messages_stay_within_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sixteen messages that stay incomplete, and one that is complete."""
    monkeypatch.setattr(receive_budget, "WAIT_S", 5.0)
    refused: list[int] = []
    budget = ReceiveBudget(32 * MIB, lambda: refused.append(1))
    server = RpcServer(max_request_bytes=16 * MIB, budget=budget)
    server.add_service(pb.DESCRIPTOR.services_by_name["InferenceService"], Echo())
    port = server.listen("127.0.0.1:0")
    await server.start()
    channel = open_channel(f"127.0.0.1:{port}")
    path = "/diptych.v1.InferenceService/Detokenize"
    try:
        # A call without its message counts as incomplete.
        open_calls = [channel.stream_unary(path)(timeout=30) for _ in range(16)]
        await asyncio.sleep(0.5)
        assert budget.in_flight == 32 * MIB
        ids = pb.DetokenizeRequest(token_ids=[1] * 1000).SerializeToString()
        reply = await channel.unary_unary(path)(ids, timeout=10)
        assert pb.DetokenizeResponse.FromString(reply).text == "1000"
        assert refused
        codes = [await call.code() for call in open_calls if call.done()]
        assert codes
        assert set(codes) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        for call in open_calls:
            call.cancel()
        for _ in range(100):
            if budget.in_flight == 0:
                break
            await asyncio.sleep(0.05)
        assert budget.in_flight == 0
    finally:
        await channel.close()
        await server.stop()
