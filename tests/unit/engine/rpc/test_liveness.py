"""Silence on an open stream, over a real connection."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from engine.base.errors import Silent, Unavailable
from engine.pb.diptych.internal.v1 import worker_pb2, worker_pb2_grpc
from engine.rpc.channel import open_channel
from engine.rpc.liveness import next_message
from engine.rpc.server import RpcServer

pytestmark = pytest.mark.timeout(30)


class Scripted:
    """Sends one message after each pause, then ends."""

    def __init__(self, *pauses_s: float) -> None:
        self.pauses_s = pauses_s
        self.cancelled = asyncio.Event()

    async def Decode(self, request: Any, context: Any) -> AsyncIterator[worker_pb2.DecodeResponse]:
        try:
            for pause_s in self.pauses_s:
                await asyncio.sleep(pause_s)
                yield worker_pb2.DecodeResponse(alive=worker_pb2.Alive())
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


async def read_all(
    script: Scripted, silence_s: float, since_stall_s: Callable[[], float] = lambda: math.inf
) -> int:
    server = RpcServer()
    server.add_service(worker_pb2.DESCRIPTOR.services_by_name["DecodeService"], script)
    address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    await server.start()
    channel = open_channel(address)
    try:
        call = worker_pb2_grpc.DecodeServiceStub(channel).Decode(worker_pb2.DecodeRequest())
        count = 0
        while await next_message(call, "worker d7", silence_s, since_stall_s) is not None:
            count += 1
        return count
    finally:
        if script.pauses_s[-1] > 5:
            await asyncio.wait_for(script.cancelled.wait(), 2)
        await channel.close()
        await server.stop()


async def test_messages_until_the_end() -> None:
    assert await read_all(Scripted(0, 0.1, 0.1), 1.0) == 3


async def test_silence_ends_the_call_at_both_ends() -> None:
    begun = time.monotonic()
    with pytest.raises(Silent, match=r"worker d7 has sent nothing for 0\.5 s"):
        await read_all(Scripted(0, 30), 0.5)
    assert time.monotonic() - begun < 3


async def test_a_status_passes_through() -> None:
    class Failing(Scripted):
        async def Decode(self, request: Any, context: Any) -> AsyncIterator[Any]:
            raise Unavailable("gone")
            yield

    with pytest.raises(grpc.aio.AioRpcError, match="gone"):
        await read_all(Failing(0), 1.0)


async def test_silence_is_counted_from_the_last_report_of_a_stall() -> None:
    assert await read_all(Scripted(0, 1.5), 0.5, lambda: 0.1) == 2
    begun = time.monotonic()
    ages = itertools.chain([0.2, 0.0], itertools.repeat(0.5))  # reports at 0.3 and 0.8, then none
    with pytest.raises(Silent):
        await read_all(Scripted(0, 30), 0.5, lambda: next(ages))
    assert time.monotonic() - begun >= 1.3


async def test_a_loop_without_stall_reports_is_lost_after_silence_s() -> None:
    ages = [math.inf]
    with pytest.raises(Silent):
        await read_all(Scripted(0, 30), 0.5, ages.pop)  # called once
