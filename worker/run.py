"""One worker from its start to its exit status.

    gRPC and HTTP ports -> engine thread -> registration -> ... the first reason to end

A drain (see `shutdown`) ends with exit status 0, a refusal by a coordinator with 2, the death of
the engine thread with 70 (72 where its self-test failed), that of the data plane with 71. All is
taken down in the reverse order.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
from typing import Any

from prometheus_client import CollectorRegistry

from engine.base.errors import ConfigError
from engine.base.option_groups import WorkerOptions
from engine.http.guard import refusals_counter
from engine.http.holds import holds_route
from engine.http.server import make_app, serve_http
from engine.process.gc_control import freeze_heap
from engine.rpc.registration import Registration
from engine.rpc.server import RpcServer
from engine.step.build import Engine
from engine.step.engine_thread import EngineThread
from engine.telemetry.log import get_logger
from engine.telemetry.metrics import RpcMetrics
from engine.telemetry.progress import print_line
from worker import exit_status
from worker.process import WorkerProcess, WorkerSettings
from worker.services import make_services
from worker.shutdown import Orders

_log = get_logger(__name__)
_STOP_GRACE_S = 5.0
_CLEAN_UP_S = 2.0  # for what the last calls left behind: leases at peers, mostly
_HEALTH_S = 1.0  # between two updates of the health service
ENGINE = "engine"  # service name in grpc.health.v1 whose status tells whether the engine hangs


async def run_worker(settings: WorkerSettings, engine: Engine, registry: CollectorRegistry) -> int:
    """Serve until an order to stop; returns the exit status. Raises ConfigError for a used port."""
    orders = Orders(settings.worker.drain_s)
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, orders.signalled, signum)
    host = WorkerProcess(settings, engine)
    server = RpcServer(RpcMetrics(registry), reflection=False)  # only the cluster calls
    for descriptor, servicer in make_services(host):
        server.add_service(descriptor, servicer, token=settings.token)
    port = server.listen(settings.worker.listen)
    address = advertised(settings.worker, settings.worker.listen, port)
    registration: Registration | None = None
    refused = refusals_counter(registry)
    http = await serve_http(
        make_app(
            registry,
            lambda: bool(registration and registration.registered) and not host.calls.draining,
            [holds_route(host.holds.report, settings.token, refused)],
            alive=lambda: host.engine.responsive,
        ),
        settings.worker.http,
        grpc_port=port,
        allowed_hosts=settings.worker.allowed_hosts,
        refused=refused,
    )
    reaper = asyncio.create_task(host.kv.reap())
    reporting = asyncio.create_task(_report_engine_health(server, host.engine))
    host.engine.start()
    try:
        await server.start()
        registration = _registration(host, settings, orders, address, http.address)
        registration.start()
        freeze_heap()
        _log.info("worker serves", address=address, http=http.address, incarnation=host.incarnation)
        if status := await _until_the_end(host, registration, orders.stop):
            return status
        if orders.interrupted:
            print_line(f"{host.role.value}: stopping; Ctrl-C again to stop now")
        host.calls.draining = True
        registration.report_now()
        await server.set_serving(False)
        await host.calls.drain(orders.drain_s, orders.hurry)
        return orders.exit_status
    finally:
        if registration is not None:
            await registration.stop()
        await server.stop(_STOP_GRACE_S)
        await host.finish_background(_CLEAN_UP_S)
        reaper.cancel()
        reporting.cancel()
        await host.engine.stop()
        await asyncio.to_thread(host.plane.stop)
        await host.channels.close()
        await http.stop()


def _registration(
    host: WorkerProcess, settings: WorkerSettings, orders: Orders, address: str, http_address: str
) -> Registration:
    options = settings.worker
    http_port = int(http_address.rpartition(":")[2])
    return Registration(
        coordinators=options.coordinator,
        hello=host.hello(
            options.worker_id or f"{host.role.value}-{secrets.token_hex(4)}",
            address,
            advertised(options, options.http, http_port),
        ),
        load=host.load,
        on_drain=orders.drain,
        on_forget=host.forget,
        on_role_budgets=host.set_role_budgets,
        responsive=lambda: host.engine.responsive,
        token=settings.token,
    )


async def _report_engine_health(server: RpcServer, engine: EngineThread) -> None:
    """Keep the health service's entry for the engine up to date: a probe restarts this process.

    A drain changes the entry of the server, not this one.
    """
    while True:
        await server.set_serving(engine.responsive, ENGINE)
        await asyncio.sleep(_HEALTH_S)


async def _until_the_end(
    host: WorkerProcess, registration: Registration, stop: asyncio.Event
) -> int:
    """Wait for the first reason to end; returns the exit status."""
    stopped = asyncio.create_task(stop.wait())
    died = asyncio.create_task(host.engine.died.wait())
    severed = asyncio.wrap_future(host.plane.died)
    reasons: list[asyncio.Future[Any]] = [stopped, died, severed, registration.refused]
    try:
        await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        if registration.refused.done():
            raise ConfigError(f"refused by coordinator {registration.refused.result()}")
        if died.done():
            _log.error("the engine thread died; exiting", sick=host.engine.sick)
            return exit_status.SICK if host.engine.sick else exit_status.ENGINE_DIED
        if severed.done():
            _log.error("the data plane died; exiting", reason=severed.result())
            return exit_status.DATA_PLANE_DIED
        return 0
    finally:
        for future in (stopped, died, severed):
            future.cancel()
        await asyncio.gather(stopped, died, severed, return_exceptions=True)


def advertised(options: WorkerOptions, listen: str, port: int) -> str:
    """HOST:PORT by which peers reach a port on `listen`. Raises ConfigError for 0.0.0.0."""
    host = (options.advertise or listen.rpartition(":")[0]).strip("[]")
    if host in ("0.0.0.0", "::"):
        raise ConfigError(f"--listen {listen}: no peer can dial {host}; set --advertise HOST")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
