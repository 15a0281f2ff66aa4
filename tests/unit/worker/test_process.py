"""The address that a worker advertises, and what ends it."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engine.base.errors import ConfigError
from engine.base.option_groups import WorkerOptions
from engine.base.types import Role
from engine.rpc.server import RpcServer
from tests.support.engine_probe import Probe
from tests.support.worker_pair import start
from worker.exit_status import DATA_PLANE_DIED, ENGINE_DIED
from worker.run import ENGINE, _report_engine_health, _until_the_end, advertised


@pytest.mark.parametrize(
    ("advertise", "listen", "address"),
    [
        ("", "127.0.0.1:0", "127.0.0.1:7"),
        ("10.0.0.2", "0.0.0.0:0", "10.0.0.2:7"),
        ("fd00::1", "[::]:0", "[fd00::1]:7"),
        ("", "[::1]:0", "[::1]:7"),
        ("pod.workers", "0.0.0.0:50052", "pod.workers:7"),
    ],
)
def test_an_address_that_peers_can_dial(advertise: str, listen: str, address: str) -> None:
    assert advertised(WorkerOptions(advertise=advertise), listen, 7) == address


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:50052"])
def test_a_wildcard_alone_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="--advertise"):
        advertised(WorkerOptions(), listen, 7)


@pytest.mark.parametrize("thread", ["engine", "data plane"])
async def test_a_worker_does_not_outlive_its_threads(thread: str) -> None:
    worker = await start(Role.DECODE)
    refused = asyncio.get_running_loop().create_future()
    registration: Any = SimpleNamespace(refused=refused)
    ending = asyncio.create_task(_until_the_end(worker.host, registration, asyncio.Event()))
    await asyncio.sleep(0.05)
    assert not ending.done()
    if thread == "engine":
        worker.host.engine.post(Probe(_die))
        assert await asyncio.wait_for(ending, 5) == ENGINE_DIED
    else:
        worker.host.plane._submit(lambda: _die(None))
        assert await asyncio.wait_for(ending, 5) == DATA_PLANE_DIED
    await worker.stop()


async def test_the_health_service_reports_an_engine_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A drain does not count: it is no reason to kill the process."""
    monkeypatch.setattr("engine.step.engine_thread.STUCK_S", 0.1)
    monkeypatch.setattr("worker.run._HEALTH_S", 0.02)
    worker = await start(Role.DECODE)
    server = RpcServer()
    port = server.listen("127.0.0.1:0")
    await server.start()
    gate = threading.Event()
    reporting = asyncio.create_task(_report_engine_health(server, worker.host.engine))
    serving, hanging = (
        health_pb2.HealthCheckResponse.SERVING,
        health_pb2.HealthCheckResponse.NOT_SERVING,
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check

        async def until(status: int) -> None:
            async with asyncio.timeout(10):
                ask = health_pb2.HealthCheckRequest(service=ENGINE)
                while (await check(ask)).status != status:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

        await asyncio.sleep(0.1)
        await until(serving)
        await server.set_serving(False)
        await asyncio.sleep(0.1)
        await until(serving)
        worker.host.engine.post(Probe(lambda core: gate.wait(20) and None))
        await until(hanging)
        gate.set()
        await until(serving)
    reporting.cancel()
    await server.stop()
    await worker.stop()


def _die(_: object) -> None:
    raise SystemError("boom")
