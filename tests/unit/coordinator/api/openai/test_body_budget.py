"""Bodies are received within the budget of bytes in flight."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from coordinator.api.openai.body import MAX_BODY_BYTES, read_body
from coordinator.api.openai.errors import Refused, failure_of
from engine.base.errors import Overloaded
from engine.pb.diptych.v1 import inference_pb2
from engine.rpc import receive_budget
from engine.rpc.receive_budget import ReceiveBudget
from tests.support.http_front import http_front, until

MIB = 1 << 20


def headers(length: int | None) -> dict[str, str]:
    given = {"content-type": "application/json"}
    return given if length is None else {**given, "content-length": str(length)}


async def never() -> dict[str, object]:
    await asyncio.sleep(60)
    raise AssertionError("not reached")


async def whole() -> dict[str, object]:
    return {"type": "http.request", "body": b"{}", "more_body": False}


async def read(budget: ReceiveBudget, length: int | None, receive: object) -> bytes:
    with budget.lease() as lease:
        return await read_body(headers(length), receive, lease)


async def test_a_body_is_not_received_where_there_is_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(receive_budget, "WAIT_S", 0.2)
    budget = ReceiveBudget(20 * MIB)
    slow = asyncio.create_task(read(budget, 15 * MIB, never))
    await asyncio.sleep(0.01)
    assert budget.in_flight == 15 * MIB
    with pytest.raises(Overloaded) as caught:
        await read(budget, 15 * MIB, whole)
    failure = failure_of(caught.value)
    assert failure.status == 429
    assert "retry-after" in {name.lower() for name in failure.headers}
    assert await read(budget, 1000, whole) == b"{}"  # small ones need none
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)
    assert budget.in_flight == 0


async def test_a_body_of_unknown_length_takes_the_most_it_may_have() -> None:
    budget = ReceiveBudget(64 * MIB)
    slow = asyncio.create_task(read(budget, None, never))
    await asyncio.sleep(0.01)
    assert budget.in_flight == MAX_BODY_BYTES
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)
    assert budget.in_flight == 0


async def test_a_slow_body_gives_way() -> None:
    budget = ReceiveBudget(20 * MIB)
    slow = asyncio.create_task(read(budget, 15 * MIB, never))
    await asyncio.sleep(0.01)
    assert await asyncio.wait_for(read(budget, 15 * MIB, whole), 10) == b"{}"
    with pytest.raises(Overloaded, match="not complete in time"):
        await slow


async def test_a_body_that_announces_too_much_is_not_received() -> None:
    budget = ReceiveBudget()
    with pytest.raises(Refused) as caught:
        await read(budget, MAX_BODY_BYTES + 1, never)
    assert caught.value.failure.status == 413


async def test_bodies_that_fill_their_half_keep_no_grpc_call_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(receive_budget, "WAIT_S", 0.1)  # shorter than what is slow may take
    async with http_front(max_request_bytes_in_flight=32 * MIB) as front:
        host, _, port = front.coordinator.http_address.rpartition(":")
        bodies = []
        for _ in range(4):
            _, writer = await asyncio.open_connection(host, int(port))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {15 * MIB}\r\n\r\n"
            writer.write(head.encode() + b"{")
            bodies.append(writer)
        refused = partial(
            front.sample, "admission_rejections_total", reason="bytes", model_name="smollm2"
        )
        await until(lambda: refused(), 10)  # they wait for room
        asked = inference_pb2.TokenizeRequest(text="Hello")
        for _ in range(10):
            assert (await front.stub.Tokenize(asked, timeout=10)).token_ids
        for writer in bodies:
            writer.close()
