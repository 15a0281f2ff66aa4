"""A worker's streams to its coordinators: whatever ends one, another is begun."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from engine.pb.diptych.internal.v1 import registry_pb2
from engine.rpc import registration as registration_module
from engine.rpc.registration import Registration
from engine.rpc.server import RpcServer
from engine.telemetry.http import make_app, serve_http
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


class _Lines:
    """Stands in for the log: (event, fields) of each warning."""

    def __init__(self) -> None:
        self.warnings: list[tuple[str, dict[str, Any]]] = []

    def warning(self, event: str, **fields: Any) -> None:
        self.warnings.append((event, fields))

    def info(self, event: str, **fields: Any) -> None:
        pass


async def test_a_coordinator_that_is_not_reached_is_a_warning_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert registration_module.WARN_S == 10.0
    lines = _Lines()
    monkeypatch.setattr(registration_module, "_log", lines)
    monkeypatch.setattr(registration_module, "WARN_S", 0.6)
    monkeypatch.setattr(registration_module, "_RETRY_S", 0.05)
    with socket.socket() as used:  # nothing listens there
        used.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{used.getsockname()[1]}"
        registration = _registration(address, registry_pb2.Load)
        registration.start()
        async with asyncio.timeout(20):
            while len(lines.warnings) < 2:  # noqa: ASYNC110, there is nothing to wait for
                await asyncio.sleep(0.01)
        await registration.stop()
    for event, fields in lines.warnings:
        assert event == "coordinator cannot be reached"
        assert fields["coordinator"] == address
        assert fields["reason"].startswith("UNAVAILABLE: ")
    first, second = (fields["for_s"] for _, fields in lines.warnings[:2])
    assert (first, second) == (0, 1)


async def test_the_port_of_another_worker_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = _Lines()
    monkeypatch.setattr(registration_module, "_log", lines)
    server = grpc.aio.server()  # without the coordinator's methods
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    registration = _registration(f"127.0.0.1:{port}", registry_pb2.Load)
    registration.start()
    async with asyncio.timeout(20):
        while not lines.warnings:  # noqa: ASYNC110, there is nothing to wait for
            await asyncio.sleep(0.01)
    await registration.stop()
    await server.stop(None)
    reason = lines.warnings[0][1]["reason"]
    assert reason == "Method not found: expected a coordinator's gRPC port, not a worker's"


async def test_the_http_port_of_a_coordinator_is_told_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = _Lines()
    monkeypatch.setattr(registration_module, "_log", lines)
    app = make_app(CollectorRegistry(), lambda: True)
    server = await serve_http(app, "127.0.0.1:0", grpc_port=50051)
    registration = _registration(server.address, registry_pb2.Load)
    registration.start()
    async with asyncio.timeout(20):
        while not lines.warnings:  # noqa: ASYNC110, there is nothing to wait for
            await asyncio.sleep(0.01)
    await registration.stop()
    await server.stop()
    assert "the gRPC port of this process is 50051" in lines.warnings[0][1]["reason"]
