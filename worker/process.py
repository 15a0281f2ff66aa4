"""The process of a worker, whatever its role: its threads, and what its services use of them.

asyncio loop    gRPC server (Prefill, Decode, KvService, health), /metrics, registration,
                lease reaper
stalls          a thread a coordinator, which reports that the loop does not turn
                                                      <- engine.rpc.stalls.StallReporter
engine thread   model, blocks, schedule               <- engine.step.engine_thread.EngineThread
data plane      the NIXL agent, every read in flight  <- kvtransfer.data_plane.DataPlane
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.base.errors import InvalidRequest, Mismatch
from engine.base.kv_layout import hash_salt
from engine.base.option_groups import TransferOptions, WorkerOptions
from engine.base.types import (
    PROTOCOL_VERSION,
    ModelIdentity,
    Role,
    RoleBudgets,
    machine_id,
    new_incarnation,
)
from engine.pb.diptych.internal.v1 import registry_pb2
from engine.pb.diptych.internal.v1.worker_pb2_grpc import KvServiceStub
from engine.rpc.auth import ClusterToken
from engine.rpc.channel import ChannelPool
from engine.rpc.convert import enum_to_pb, to_pb
from engine.step.build import Engine
from engine.step.engine_thread import EngineDied, EngineThread
from engine.step.operations import Forget, Hold, SetRoleBudgets, Unpin
from engine.telemetry.log import get_logger
from kvtransfer.checksum import Checksums
from kvtransfer.data_plane import DataPlane
from kvtransfer.kv_service import BlockHost, KvServicer
from kvtransfer.lease import LeaseTable
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.peers import PeerTable
from kvtransfer.quarantine import Quarantine
from kvtransfer.transport import MemoryRegion
from worker.debug import BackgroundTask, Holds
from worker.load_report import load_report
from worker.shutdown import Calls

_log = get_logger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """The options of a worker that concern the process and not the engine."""

    role: Role
    worker: WorkerOptions
    transfer: TransferOptions
    token: ClusterToken | None = None  # sent with its calls, required of its callers


class EngineBlocks:
    """`kvtransfer.kv_service.BlockHost`: pins and unpins on the engine thread."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine

    async def hold(self, hashes: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Pin the longest leading run of these hashes: (block ids, generations)."""
        return await self._engine.call(Hold(tuple(hashes)))

    async def unpin(self, block_ids: Sequence[int]) -> None:
        """Take one pin from each id.

        No error: a slow engine does it later, and a dead one holds nothing.
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
        self.blocks: BlockHost = EngineBlocks(self.engine)
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
        self.background: dict[asyncio.Task[Any], BackgroundTask] = {}
        self.holds = Holds(self, self.role, self.background)

    def in_background(self, work: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        """Run a task that outlives the call that started it."""
        task = asyncio.create_task(work)
        self.background[task] = BackgroundTask.now(getattr(work, "__qualname__", "work"))
        task.add_done_callback(self.background.pop)
        return task

    async def finish_background(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` for the tasks that outlived their calls."""
        if self.background:
            await asyncio.wait(set(self.background), timeout=timeout_s)

    def salt(self, cache_salt: str) -> bytes:
        """Return the root of the block hashes of requests with this salt."""
        return hash_salt(digest=self.identity.digest, cache_salt=cache_salt)

    def check_incarnation(self, incarnation: str) -> None:
        """Raise Mismatch where a caller addresses another process; "" addresses any."""
        if incarnation and incarnation != self.incarnation:
            raise Mismatch(f"this is incarnation {self.incarnation}, not {incarnation}")

    def check_token_ids(self, token_ids: Sequence[int]) -> None:
        """Raise InvalidRequest for ids that the model has no embedding for."""
        if token_ids and max(token_ids) >= self.identity.vocab_size:
            raise InvalidRequest(
                "token_ids",
                f"{max(token_ids)} is out of range; expected less than {self.identity.vocab_size}",
            )

    @property
    def role_budgets(self) -> RoleBudgets:
        """What this worker takes from others, as its engine applied it last."""
        return self.engine.load.role_budgets

    def set_role_budgets(self, role_budgets: RoleBudgets) -> None:
        """Have the engine apply new budgets before its next step; the heartbeat reports them."""
        _log.info(
            "role budgets set",
            prompt_tokens=role_budgets.prompt_tokens,
            answers=role_budgets.answers,
        )
        self.engine.post(SetRoleBudgets(role_budgets))

    def forget(self, incarnation: str) -> None:
        """Use no block that a sick peer had a part in."""
        self.engine.post(Forget(incarnation))

    def hello(self, worker_id: str, address: str, http_address: str) -> registry_pb2.Hello:
        """The worker's introduction to a coordinator; the addresses are those for peers."""
        return registry_pb2.Hello(
            worker_id=worker_id,
            incarnation=self.incarnation,
            role=enum_to_pb(self.role),
            address=address,
            http_address=http_address,
            model=to_pb(registry_pb2.ModelIdentity, self.identity),
            protocol_version=PROTOCOL_VERSION,
            kv_pool=to_pb(registry_pb2.KVPool, self.kv_pool),
        )

    def load(self) -> registry_pb2.Load | None:
        """The heartbeat; None while the engine hangs."""
        return load_report(self.engine, self.plane, self.peers, draining=self.calls.draining)


def _data_plane(engine: Engine, incarnation: str, options: TransferOptions) -> DataPlane:
    cache, generations = engine.kv_cache, engine.core.pool.generations
    plane = DataPlane(
        NixlTransport,
        incarnation=incarnation,
        blocks=MemoryRegion(cache.address, cache.num_bytes, cache.kind, cache.device_id),
        generations=MemoryRegion(generations.ctypes.data, generations.nbytes),
        num_blocks=engine.core.pool.num_blocks,
        block_bytes=engine.layout.block_bytes,
        groups=engine.layout.groups,
        machine=machine_id(),
        quarantine=Quarantine(options.quarantine_s, options.quarantine_share),
        on_restart=engine.metrics.kv_data_plane_restarts.inc,
    )
    engine.metrics.watch_quarantine(lambda: plane.counters.num_quarantined_blocks)
    return plane
