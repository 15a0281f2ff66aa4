"""A worker's streams to its coordinators: whatever ends one, another is begun."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from engine.pb.diptych.internal.v1 import registry_pb2
from engine.rpc.registration import Registration
from engine.rpc.server import RpcServer
from engine.types import Role
from tests.support.fake_decode import identity

pytestmark = pytest.mark.timeout(30)


class Registry:
    """Welcomes everybody and counts what it is told."""

    def __init__(self) -> None:
        self.num_hellos = 0
        self.num_loads = 0

    async def Register(self, messages: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for message in messages:
            self.num_loads += message.HasField("load")
            if message.HasField("hello"):
                self.num_hellos += 1
                welcome = registry_pb2.Welcome(heartbeat_s=0.05)
                yield registry_pb2.CoordinatorMessage(welcome=welcome)


async def test_a_load_that_cannot_be_told_costs_a_stream_and_not_the_worker() -> None:
    registry, server = Registry(), RpcServer()
    server.add_service(registry_pb2.DESCRIPTOR.services_by_name["RegistryService"], registry)
    address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    await server.start()
    failures: list[Exception] = [ZeroDivisionError("oops")]

    def load() -> registry_pb2.Load:
        if registry.num_loads == 2 and failures:
            raise failures.pop()
        return registry_pb2.Load()

    registration = _registration(address, load)
    registration.start()
    async with asyncio.timeout(10):
        while registry.num_loads < 5:  # noqa: ASYNC110, there is nobody who could set an event
            await asyncio.sleep(0.01)
    assert registry.num_hellos == 2
    assert registration.registered
    await registration.stop()
    await server.stop()


def _registration(address: str, load: Callable[[], registry_pb2.Load | None]) -> Registration:
    return Registration(
        coordinators=address,
        worker_id="d0",
        incarnation="i0",
        role=Role.DECODE,
        address="127.0.0.1:1",
        http_address="",
        identity=identity(),
        load=load,
        on_drain=lambda deadline_s: None,
    )
