"""What a prefill and a decode process have in common: threads, doors, membership, and their end.

    asyncio loop    gRPC server (the role's service, KvService, health), /metrics,
                    registration, lease reaper
    stalls          a thread a coordinator, which reports that the loop does not turn
                                                          <- engine.rpc.stalls.StallReporter
    engine thread   model, blocks, schedule               <- engine.step.engine_thread.EngineThread
    data plane      the NIXL agent, every read in flight  <- kvtransfer.data_plane.DataPlane

`run_worker` builds them in order and takes them down in reverse. A drain (see `drain`), a refusal
by a coordinator, the death of the engine thread and that of the data plane all end there, with exit
status 0, 2, 70 (72 where its self-test failed) and 71.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import CollectorRegistry

from engine.base.errors import ConfigError, InvalidRequest, Mismatch
from engine.base.kv_layout import hash_salt
from engine.base.options import TransferOptions, WorkerOptions
from engine.base.types import Health, ModelIdentity, Role, machine_id, new_incarnation
from engine.http.guard import refusals_counter
from engine.http.holds import holds_route
from engine.http.server import make_app, serve_http
from engine.pb.diptych.internal.v1 import registry_pb2, worker_pb2
from engine.pb.diptych.internal.v1.worker_pb2_grpc import KvServiceStub
from engine.process.gc_control import freeze_heap
from engine.rpc.channel import ChannelPool
from engine.rpc.convert import health_to_pb, link_to_pb
from engine.rpc.registration import Registration
from engine.rpc.server import RpcServer
from engine.rpc.trust import ClusterToken
from engine.scheduling.block_pool import GENERATION_BYTES
from engine.step.build import Engine
from engine.step.engine_thread import EngineDied, EngineThread
from engine.step.operations import Forget, Hold, Unpin
from engine.telemetry.log import get_logger
from engine.telemetry.metrics import RpcMetrics
from engine.telemetry.progress import print_line
from kvtransfer.checksum import Checksums
from kvtransfer.data_plane import DataPlane
from kvtransfer.kv_service import KvServicer
from kvtransfer.lease import LeaseTable
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.peers import PeerTable
from kvtransfer.quarantine import Quarantine
from kvtransfer.transport import MemoryRegion
from worker import exit_status
from worker.debug import Begun, Holds
from worker.shutdown import Calls, Orders

_log = get_logger(__name__)
_T = TypeVar("_T")
_STOP_GRACE_S = 5.0
_CLEAN_UP_S = 2.0  # for what the last calls left behind: leases at peers, mostly
_VOUCH_S = 1.0
ENGINE = "engine"  # the name under which grpc.health.v1 tells whether the engine hangs
EXIT_REFUSED = 2
EXIT_DATA_PLANE_DIED = 71

Services = Sequence[tuple[ServiceDescriptor, object]]


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """A worker's options, as far as they concern the process and not the engine."""

    role: Role
    worker: WorkerOptions
    transfer: TransferOptions
    token: ClusterToken | None = None  # of its calls, and asked of its callers


class EngineBlocks:
    """`kvtransfer.kv_service.BlockHost`: pins and unpins on the engine thread."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine

    async def hold(self, hashes: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Pin the longest leading run of these names: (block ids, generations)."""
        return await self._engine.call(Hold(tuple(hashes)))

    async def unpin(self, block_ids: Sequence[int]) -> None:
        """Take one pin from each id.

        No error: an engine that is slow does it later, with one that died nothing is held.
        """
        with contextlib.suppress(TimeoutError, EngineDied):
            await self._engine.call(Unpin(block_ids))


class WorkerProcess:
    """The parts of a running worker that its services use. Lives on the asyncio loop."""

    def __init__(self, settings: WorkerSettings, engine: Engine) -> None:
        self.role = settings.role
        self.transfer = settings.transfer
        self.identity: ModelIdentity = engine.identity
        self.kv_pool = engine.kv_pool
        self.incarnation = new_incarnation()
        self.metrics = engine.metrics
        self.vocabulary = engine.vocabulary
        self.engine = EngineThread(engine.core, asyncio.get_running_loop())
        self.channels = ChannelPool(settings.token)
        self.plane = _data_plane(engine, self.incarnation, settings.transfer)
        self.plane.start()
        self.peers = PeerTable(
            self.plane,
            digest=self.identity.digest,
            stub_factory=lambda address: KvServiceStub(self.channels.get(address)),
        )
        self.metrics.watch_links(self.peers.links)
        leases = LeaseTable(time.monotonic, settings.transfer.lease_ttl_s)
        self.blocks = EngineBlocks(self.engine)
        self.checksums = Checksums(engine.kv_cache.read_block)
        self.kv = KvServicer(
            lambda: self.plane.local_pool,
            self.identity.digest,
            self.blocks,
            leases,
            engine.metrics.kv_lease_refused,
            engine.metrics.kv_leases_expired.inc,
        )
        self.calls = Calls(self.engine)
        self.background: dict[asyncio.Task[Any], Begun] = {}
        self.holds = Holds(self)

    def in_background(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """A task that outlives the call that began it."""
        task = asyncio.create_task(work)
        self.background[task] = Begun.now(getattr(work, "__qualname__", "work"))
        task.add_done_callback(self.background.pop)
        return task

    async def finish_background(self, timeout_s: float) -> None:
        """Wait a while for the tasks that outlived their calls."""
        if self.background:
            await asyncio.wait(set(self.background), timeout=timeout_s)

    def salt(self, cache_salt: str) -> bytes:
        """The root of block names for requests with this salt."""
        return hash_salt(digest=self.identity.digest, cache_salt=cache_salt)

    def check_incarnation(self, meant: str) -> None:
        """Raise Mismatch if a caller means another process than this one."""
        if meant and meant != self.incarnation:
            raise Mismatch(f"this is incarnation {self.incarnation}, not {meant}")

    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        """Raise InvalidRequest for ids that the model has no embedding for."""
        if token_ids and max(token_ids) >= self.identity.vocab_size:
            raise InvalidRequest(
                "token_ids",
                f"{max(token_ids)} is out of range; expected less than {self.identity.vocab_size}",
            )

    @property
    def health(self) -> Health:
        """Whether this worker computes what it should, as far as it knows."""
        if self.engine.sick:
            return Health.SICK
        return Health.DEGRADED if self.engine.load.is_degraded(time.monotonic()) else Health.OK

    def forget(self, incarnation: str) -> None:
        """A peer is sick: use no block that it had a part in."""
        self.engine.post(Forget(incarnation))

    def load(self) -> registry_pb2.Load | None:
        """What coordinators are told with every heartbeat; None while the engine hangs."""
        if not self.engine.responsive:
            return None
        load, moved = self.engine.load, self.plane.counters
        return registry_pb2.Load(
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            waiting_tokens=load.waiting_tokens,
            free_blocks=load.free_blocks,
            cached_blocks=load.cached_blocks,
            held_blocks=load.held_blocks,
            total_blocks=load.total_blocks,
            quarantined_blocks=moved.num_quarantined_blocks,
            draining=self.calls.draining,
            health=health_to_pb(self.health),
            links=[link_to_pb(link) for link in self.peers.links()],
            totals=registry_pb2.Totals(
                prompt_tokens_computed=load.prompt_tokens_computed,
                prompt_tokens_cached=load.prompt_tokens_cached,
                blocks_pulled=moved.num_blocks,
                bytes_pulled=moved.num_bytes,
                pull_seconds=moved.seconds,
                stale_reads=moved.num_stale_blocks,
                draft_tokens=load.draft_tokens,
                accepted_tokens=load.accepted_tokens,
            ),
        )


def _data_plane(engine: Engine, incarnation: str, options: TransferOptions) -> DataPlane:
    cache, generations = engine.kv_cache, engine.core.pool.generations
    plane = DataPlane(
        NixlTransport,
        incarnation=incarnation,
        blocks=MemoryRegion(
            cache.address,
            cache.num_bytes,
            "VRAM" if cache.kind == "VRAM" else "DRAM",
            cache.device_id,
        ),
        generations=MemoryRegion(generations.ctypes.data, len(generations) * GENERATION_BYTES),
        num_blocks=engine.core.pool.num_blocks,
        block_bytes=engine.layout.block_bytes,
        machine=machine_id(),
        quarantine=Quarantine(options.quarantine_s, options.quarantine_share),
        on_restart=engine.metrics.kv_data_plane_restarts.inc,
    )
    engine.metrics.watch_quarantine(lambda: plane.counters.num_quarantined_blocks)
    return plane


async def run_worker(
    settings: WorkerSettings,
    engine: Engine,
    registry: CollectorRegistry,
    make_services: Callable[[WorkerProcess], Services],
) -> int:
    """Serve until told to stop; returns the exit status. Raises ConfigError for a used port."""
    orders = Orders(settings.worker.drain_s)
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, orders.signalled, signum)
    host = WorkerProcess(settings, engine)
    server = RpcServer(RpcMetrics(registry), reflection=False)  # none but the cluster calls
    kv_service = worker_pb2.DESCRIPTOR.services_by_name["KvService"]
    for descriptor, servicer in [*make_services(host), (kv_service, host.kv)]:
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
    vouching = asyncio.create_task(_vouch(server, host.engine))
    host.engine.start()
    try:
        await server.start()
        registration = Registration(
            coordinators=settings.worker.coordinator,
            worker_id=settings.worker.worker_id or f"{host.role.value}-{secrets.token_hex(4)}",
            incarnation=host.incarnation,
            role=host.role,
            address=address,
            http_address=advertised(
                settings.worker, settings.worker.http, int(http.address.rpartition(":")[2])
            ),
            identity=host.identity,
            load=host.load,
            on_drain=orders.told,
            on_forget=host.forget,
            responsive=lambda: host.engine.responsive,
            token=settings.token,
            kv_pool=host.kv_pool,
        )
        registration.start()
        freeze_heap()
        _log.info("worker serves", address=address, http=http.address, incarnation=host.incarnation)
        status = await _until_the_end(host, registration, orders.stop)
        if status == 0:
            if orders.interrupted:
                print_line(f"{host.role.value}: stopping; Ctrl-C again to stop now")
            host.calls.draining = True
            registration.report_now()
            await server.set_serving(False)
            await host.calls.drain(orders.drain_s, orders.hurry)
            return orders.exit_status
        return status
    finally:
        if registration is not None:
            await registration.stop()
        await server.stop(_STOP_GRACE_S)
        await host.finish_background(_CLEAN_UP_S)
        reaper.cancel()
        vouching.cancel()
        await host.engine.stop()
        await asyncio.to_thread(host.plane.stop)
        await host.channels.close()
        await http.stop()


async def _vouch(server: RpcServer, engine: EngineThread) -> None:
    """Have the health service tell whether the engine hangs, for what restarts this process. A
    drain does not change it, other than what it tells of the server.
    """
    while True:
        await server.set_serving(engine.responsive, ENGINE)
        await asyncio.sleep(_VOUCH_S)


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
            return EXIT_DATA_PLANE_DIED
        return 0
    finally:
        for future in (stopped, died, severed):
            future.cancel()
        await asyncio.gather(stopped, died, severed, return_exceptions=True)


def advertised(options: WorkerOptions, listen: str, port: int) -> str:
    """HOST:PORT by which others reach what listens on `listen`. Raises ConfigError for 0.0.0.0."""
    host = (options.advertise or listen.rpartition(":")[0]).strip("[]")
    if host in ("0.0.0.0", "::"):
        raise ConfigError(f"--listen {listen}: nobody can dial {host}; set --advertise HOST")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
