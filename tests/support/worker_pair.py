"""Both panels in one process, real but for two things: the model is a hash of the history that it
reads back from block memory, and the transport copies within the process, when the test lets it.

Engine threads, data planes, leases, gRPC servers and services are the ones that workers run.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import grpc
import numpy as np
import torch
from prometheus_client import CollectorRegistry

from decode.speculative.ngram import NgramDrafter
from decode.speculative.verify import verify
from engine.attention.batch import Row
from engine.base.errors import DiptychError
from engine.base.kv_columns import FULL
from engine.base.kv_layout import KVLayout, hash_salt
from engine.base.option_groups import TransferOptions, WorkerOptions
from engine.base.types import ModelIdentity, Role, SamplingParams, StopParams
from engine.pb.diptych.internal.v1 import worker_pb2, worker_pb2_grpc
from engine.rpc.convert import sampling_to_pb, stop_to_pb
from engine.rpc.server import RpcServer
from engine.rpc.status import from_rpc_error
from engine.runner.base import ModelRunner, StepOutput
from engine.sampling import Sampler
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.plan import Budgets
from engine.scheduling.request import EngineRequest
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.speculation import Speculation
from engine.step.build import Engine, default_budgets
from engine.step.core import EngineCore
from engine.telemetry.metrics import WorkerMetrics
from kvtransfer.transport import Extent, MemoryRegion, ReadState
from tests.support.core_bench import oracle
from tests.support.engine_probe import Probe
from tests.support.history_model import VOCAB, logits_of, places
from tests.support.invariants import check_pool
from worker.process import WorkerProcess, WorkerSettings
from worker.services import make_services

SIZE = 4
DIGEST = "test"
NEVER_WRITTEN = -1
GREEDY = SamplingParams()


class ArrayRunner(ModelRunner):
    """HistoryRunner over plain memory: [num_blocks, SIZE] int64, the token at every slot."""

    def __init__(self, num_blocks: int, windows: Sequence[int] = FULL) -> None:
        self.windows = windows
        self.memory = np.full((num_blocks, SIZE), NEVER_WRITTEN, dtype=np.int64)
        self.before_step: Callable[[], None] = lambda: None
        self.num_tokens = 0

    def launch(self, rows: Sequence[Row]) -> StepOutput:
        self.before_step()
        for row in rows:
            for ahead, token in enumerate(row.token_ids):
                entry, offset = divmod(row.start + ahead, SIZE)
                self.memory[row.block_ids[entry], offset] = token
            self.num_tokens += len(row.token_ids)
        out = []
        for row in rows:
            end = row.start + len(row.token_ids)
            for position in range(end - row.num_logits, end):
                at = np.array(places(row, position, SIZE, self.windows))
                out.append(logits_of(self.memory[at[:, 0], at[:, 1]].tolist()))
        return StepOutput(torch.stack(out) if out else torch.empty(0, VOCAB))


@dataclass
class Read:
    """A posted read: half of its bytes move at once, the others when `gate` lets it end."""

    peer: str
    is_fence: bool
    remote: MemoryRegion
    local: MemoryRegion
    extents: Sequence[Extent]
    num_polls: int = 0

    def copy(self, half: int) -> None:
        for source, target, size in self.extents:
            start, end = (0, size // 2) if half == 0 else (size // 2, size)
            ctypes.memmove(
                self.local.address + target + start,
                self.remote.address + source + start,
                end - start,
            )


@dataclass
class LocalTransport:
    """See `kvtransfer.transport.Transport`; `gate` may raise, or hold a read back."""

    gate: Callable[[Read], ReadState] = lambda read: ReadState.DONE
    pending: list[Read] = field(default_factory=list)

    def register(self, regions: Sequence[MemoryRegion]) -> None:
        self.landing = regions[2]

    def metadata(self) -> bytes:
        return b"here"

    def connect(self, agent: str, metadata: bytes) -> str:
        return agent

    def disconnect(self, peer: str) -> None:
        assert not [read for read in self.pending if read.peer == peer]

    def post_read(
        self, peer: str, remote: MemoryRegion, local: MemoryRegion, extents: Sequence[Extent]
    ) -> Read:
        read = Read(peer, local == self.landing, remote, local, extents)
        read.copy(0)
        self.pending.append(read)
        return read

    def poll(self, handle: Read) -> ReadState:
        handle.num_polls += 1
        state = self.gate(handle)
        if state is ReadState.DONE:
            handle.copy(1)
        return state

    def release(self, handle: Read) -> None:
        self.pending.remove(handle)

    def lane(self, kind: str, *, same_machine: bool) -> str:
        return "test/memory" if same_machine else "test/wire"

    def close(self) -> None:
        self.pending.clear()  # nothing lands any more


@dataclass
class PairedWorker:
    """One worker."""

    host: WorkerProcess
    runner: ArrayRunner
    transport: LocalTransport
    server: RpcServer
    reaper: asyncio.Task[Any]
    address: str

    @property
    def peer(self) -> worker_pb2.PrefillPeer:
        return worker_pb2.PrefillPeer(
            worker_id="p", incarnation=self.host.incarnation, address=self.address
        )

    def pool(self) -> BlockPool:
        return self.host.engine.core.pool

    def busy(self) -> dict[str, int]:
        """Everything that must be zero at rest."""
        core = self.host.engine.core
        return {
            "held": self.pool().num_held,
            "requests": len(core._requests),
            "active": len(core.scheduler.active),
            "waiting": len(core.scheduler.waiting),
            "producers": len(core.scheduler._producers),
            "streams": len(self.host.engine._streams),
            "leases": len(self.host.kv.table),
            "background": len(self.host.background),
            "reads": len(self.transport.pending),
            "pulls": self.host.plane.counters.num_in_flight,
            "quarantined": self.host.plane.counters.num_quarantined_blocks,
        }

    async def lose_leases(self, owner: str) -> None:
        """As if its leases had run out: what they pinned may be taken at any moment."""
        leases = [lease.id for lease in self.host.kv.table.all if lease.owner == owner]
        await self.host.kv.release(owner, leases)

    async def stop(self) -> None:
        await self.server.stop(0)
        self.reaper.cancel()
        await self.host.engine.stop()
        await asyncio.to_thread(self.host.plane.stop)
        await self.host.channels.close()


async def start(
    role: Role,
    num_blocks: int = 64,
    *,
    prompt_tokens: int = 8,
    draft_tokens: int = 0,
    transfer: TransferOptions | None = None,
    max_model_len: int = 120,
    windows: tuple[int, ...] = FULL,
) -> PairedWorker:
    """A serving worker; the caller stops it."""
    runner, transport = ArrayRunner(num_blocks, windows), LocalTransport()
    speculation = Speculation(NgramDrafter(), verify, draft_tokens) if draft_tokens else None
    budgets = Budgets(prompt_tokens, 8, 2.0)
    pool = BlockPool(num_blocks)
    scheduler = Scheduler(pool, SIZE, budgets, speculation, max_model_len, windows)
    scheduler.set_role_budgets(default_budgets(role, budgets))
    metrics = WorkerMetrics(CollectorRegistry(), "test")
    sampler = Sampler(VOCAB, torch.device("cpu"))
    core = EngineCore(scheduler, runner, sampler, metrics, time.monotonic)
    cache: Any = mock.Mock(
        address=runner.memory.ctypes.data,
        num_bytes=runner.memory.nbytes,
        kind="DRAM",
        device_id=0,
        read_block=lambda block: memoryview(runner.memory[block].data).cast("B"),
    )
    layout = KVLayout(1, 1, 1, SIZE, "float32")  # 2 * SIZE floats: as many bytes as SIZE int64
    identity = ModelIdentity("test", DIGEST, "test", max_model_len, SIZE, VOCAB)
    settings = WorkerSettings(role, WorkerOptions(), transfer or TransferOptions())
    with mock.patch("worker.process.NixlTransport", lambda agent: transport):
        host = WorkerProcess(settings, Engine(core, cache, layout, identity, metrics))
    server = RpcServer()
    for descriptor, servicer in make_services(host):
        server.add_service(descriptor, servicer)
    port = server.listen("127.0.0.1:0")
    host.engine.start()
    await server.start()
    reaper = asyncio.create_task(host.kv.reap())
    return PairedWorker(host, runner, transport, server, reaper, f"127.0.0.1:{port}")


@contextlib.asynccontextmanager
async def pair(
    prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None
) -> AsyncIterator[tuple[PairedWorker, PairedWorker]]:
    """A prefill and a decode worker."""
    p = await start(Role.PREFILL, **(prefill or {}))
    d = await start(Role.DECODE, **(decode or {}))
    try:
        yield p, d
    finally:
        for panel in (p, d):
            panel.transport.gate = lambda read: ReadState.DONE
        await d.stop()
        await p.stop()


@dataclass(frozen=True)
class Ask:
    """A request of the plainest kind."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams = GREEDY

    def answer(self, windows: Sequence[int] = FULL) -> list[int]:
        """The tokens that law 1 demands."""
        return oracle(self.work(), 120, windows)[0]

    def work(self) -> EngineRequest:
        """The same as the engine takes it."""
        stop = StopParams(max_tokens=self.max_tokens)
        return EngineRequest("r", self.prompt, hash_salt(digest=DIGEST), self.sampling, stop)

    def pb(
        self, prefill: PairedWorker | None, output: Sequence[int] = ()
    ) -> worker_pb2.DecodeRequest:
        request = worker_pb2.DecodeRequest(
            request_id="r",
            prompt_token_ids=self.prompt,
            output_token_ids=output,
            sampling=sampling_to_pb(self.sampling),
            stop=stop_to_pb(StopParams(max_tokens=self.max_tokens)),
        )
        if prefill is not None:
            request.prefill.CopyFrom(prefill.peer)
        return request


def decode_stub(panel: PairedWorker) -> Any:
    """The Decode method of a worker."""
    return worker_pb2_grpc.DecodeServiceStub(panel.host.channels.get(panel.address))


async def collect(call: Any, into: list[int]) -> None:
    """Read an answer to its end. Raises DiptychError."""
    try:
        async for response in call:
            into += response.tokens.token_ids
    except grpc.aio.AioRpcError as error:
        meant = from_rpc_error(error)
        raise meant or error from error


async def answer(
    decode: PairedWorker, prefill: PairedWorker | None, ask: Ask, max_attempts: int = 50
) -> list[int]:
    """As the coordinator: call until it is whole, with what has come so far, ever less often.

    A peer that is being disconnected refuses calls until its last read ends, so the waits grow.
    """
    tokens: list[int] = []
    for attempt in range(max_attempts):
        try:
            call = decode_stub(decode).Decode(ask.pb(prefill, tokens), timeout=20)
            await collect(call, tokens)
            return tokens
        except DiptychError as error:
            last = error
            await asyncio.sleep(min(0.01 * 1.5**attempt, 0.25))
    raise AssertionError(f"not answered after {max_attempts} attempts; the last failed: {last}")


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110, no component sets an event
            await asyncio.sleep(0.005)


async def assert_at_rest(*panels: PairedWorker, timeout_s: float = 10.0) -> None:
    """Nothing is held, leased, read, waited for; free + cached = total."""
    try:
        await until(lambda: not any(n for p in panels for n in p.busy().values()), timeout_s)
    except TimeoutError:
        raise AssertionError([p.busy() for p in panels]) from None
    for panel in panels:
        await panel.host.engine.call(Probe(lambda core: check_pool(core.pool)))
        pool = panel.pool()
        assert pool.num_free + pool.num_cached == pool.num_blocks


def random_ask(rng: random.Random, shared: Sequence[int], longest: int) -> Ask:
    prompt = [*shared[: rng.randrange(len(shared) + 1)]] if rng.random() < 0.6 else []
    length = rng.choice([1, SIZE, SIZE + 1, 2 * SIZE, rng.randint(1, longest)])
    prompt += [rng.randrange(VOCAB) for _ in range(length)]
    sampling = SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=rng.getrandbits(64))
    return Ask(tuple(prompt), rng.randint(1, 16), sampling)
