"""A worker's streams to its coordinators: a stream that ends is begun again."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest
from prometheus_client import CollectorRegistry

from engine.base.types import PROTOCOL_VERSION, Role
from engine.http.server import make_app, serve_http
from engine.pb.diptych.internal.v1 import registry_pb2
from engine.rpc import registration as registration_module
from engine.rpc.convert import enum_to_pb, to_pb
from engine.rpc.liveness import STALL_S
from engine.rpc.registration import Registration
from engine.rpc.server import RpcServer
from tests.support.fake_decode import identity

pytestmark = pytest.mark.timeout(30)


class Registry:
    """Welcomes all workers and counts their messages."""

    def __init__(self) -> None:
        self.num_hellos = 0
        self.num_loads = 0
        self.stalls: list[registry_pb2.Stall] = []

    async def ReportStall(self, request: Any, context: Any) -> registry_pb2.StallNoted:
        self.stalls.append(request)
        return registry_pb2.StallNoted()

    async def Register(self, messages: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        async for message in messages:
            self.num_loads += message.HasField("load")
            if message.HasField("hello"):
                self.num_hellos += 1
                welcome = registry_pb2.Welcome(heartbeat_s=0.05)
                yield registry_pb2.CoordinatorMessage(welcome=welcome)


async def test_a_failing_load_ends_the_stream_and_not_the_worker() -> None:
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
        while registry.num_loads < 5:  # noqa: ASYNC110, nothing could set an event
            await asyncio.sleep(0.01)
    assert registry.num_hellos == 2
    assert registration.registered
    await registration.stop()
    await server.stop()


def _registration(
    address: str,
    load: Callable[[], registry_pb2.Load | None],
    responsive: Callable[[], bool] = lambda: True,
) -> Registration:
    return Registration(
        coordinators=address,
        hello=registry_pb2.Hello(
            worker_id="d0",
            incarnation="i0",
            role=enum_to_pb(Role.DECODE),
            address="127.0.0.1:1",
            model=to_pb(registry_pb2.ModelIdentity, identity()),
            protocol_version=PROTOCOL_VERSION,
        ),
        load=load,
        on_drain=lambda deadline_s: None,
        responsive=responsive,
    )


class _Lines:
    """Stands in for the log: (event, fields) of each warning."""

    def __init__(self) -> None:
        self.warnings: list[tuple[str, dict[str, Any]]] = []

    def warning(self, event: str, **fields: Any) -> None:
        self.warnings.append((event, fields))

    def info(self, event: str, **fields: Any) -> None:
        pass


async def test_an_unreachable_coordinator_is_logged_at_intervals(
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


async def test_the_port_of_another_worker_is_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_the_http_port_of_a_coordinator_is_recognized(
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


async def stalls_of(stall: Callable[[], None], responsive: bool = True) -> list[float]:
    """The reports about an event loop, on a thread, that `stall` blocks."""
    registry, server = Registry(), RpcServer()
    server.add_service(registry_pb2.DESCRIPTOR.services_by_name["RegistryService"], registry)
    address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    await server.start()

    async def worker() -> None:
        registration = _registration(address, registry_pb2.Load, lambda: responsive)
        registration.start()
        while not registration.registered:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.5)  # the loop runs normally
        stall()
        await registration.stop()

    await asyncio.to_thread(asyncio.run, worker())
    await server.stop()
    assert all(s.worker_id == "d0" and s.incarnation == "i0" for s in registry.stalls)
    assert not [t for t in threading.enumerate() if t.name == "stalls"]
    return [s.lag_s for s in registry.stalls]


def _sleep() -> None:
    time.sleep(3.0)


def _compute() -> None:
    until = time.monotonic() + 3.0
    while time.monotonic() < until:
        sum(range(100))


@pytest.mark.parametrize("stall", [_sleep, _compute])
async def test_a_stalled_event_loop_is_reported(stall: Callable[[], None]) -> None:
    first, *lags = await stalls_of(stall)
    assert first == 0.0, "it connects"
    assert len(lags) >= 3
    assert lags == sorted(lags)
    assert lags[0] >= STALL_S
    assert lags[-1] > 2.0


async def test_no_stall_is_reported_for_a_hanging_engine() -> None:
    assert await stalls_of(_sleep, responsive=False) == [0.0]
