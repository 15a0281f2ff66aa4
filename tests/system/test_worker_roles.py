"""A running prefill worker becomes a decode worker by one message, and writes the same tokens."""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from coordinator.cluster.membership import Membership
from coordinator.cluster.registry_service import RegistryServicer
from coordinator.cluster.worker import Worker
from engine.base.errors import Unavailable
from engine.base.types import RoleBudgets, SamplingParams, StopParams
from engine.pb.diptych.internal.v1 import registry_pb2, worker_pb2, worker_pb2_grpc
from engine.rpc.auth import ClusterToken
from engine.rpc.channel import open_channel
from engine.rpc.convert import sampling_to_pb, stop_to_pb
from engine.rpc.server import RpcServer
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from tests.support.paths import DATA, ROOT
from tests.support.stack import EXACT
from tests.support.worker_pair import collect

ORACLE = json.loads((DATA / "greedy_fp32.json").read_text())
CASE = next(case for case in ORACLE if len(case["prompt"]) == 300)
NUM_TOKENS = 24
VOCAB = 49152
START_S = 120.0
pytestmark = pytest.mark.timeout(300)


async def until(condition: Callable[[], bool], timeout_s: float) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110, the table has no event for every heartbeat
            await asyncio.sleep(0.05)


@asynccontextmanager
async def registry(token: ClusterToken) -> AsyncIterator[tuple[RegistryServicer, Membership, str]]:
    metrics = CoordinatorMetrics(CollectorRegistry(), "smollm2")
    membership = Membership("smollm2", VOCAB, metrics)
    servicer, server = RegistryServicer(membership, "c"), RpcServer()
    service = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"]
    server.add_service(service, servicer, token=token)
    address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    await server.start()
    try:
        yield servicer, membership, address
    finally:
        await server.stop()


async def answer(worker: Worker, token: ClusterToken) -> list[int]:
    """CASE's greedy tokens, straight from a worker, which computes the prompt itself."""
    request = worker_pb2.DecodeRequest(
        request_id="r",
        prompt_token_ids=CASE["prompt"],
        sampling=sampling_to_pb(SamplingParams()),
        stop=stop_to_pb(StopParams(max_tokens=NUM_TOKENS)),
    )
    tokens: list[int] = []
    channel = open_channel(worker.peer.address, token=token)
    try:
        stub = worker_pb2_grpc.DecodeServiceStub(channel)
        await collect(stub.Decode(request, timeout=120), tokens)
    finally:
        await channel.close()
    return tokens


async def test_a_prefill_worker_that_gets_answers_to_write(tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text(secrets.token_hex(16))
    token = ClusterToken.load(str(secret))
    async with registry(token) as (servicer, membership, address):
        command = [
            *(sys.executable, "-m", "worker.cli", "prefill", "start", *EXACT),
            *("--coordinator", address, "--cluster-token-file", str(secret)),
        ]
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(  # noqa: ASYNC220, it returns at once
                command, stdout=log, stderr=log, cwd=ROOT
            )
        try:
            await until(lambda: bool(membership.snapshot()) or process.poll() is not None, START_S)
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]

            def row() -> Worker:
                return membership.snapshot()[0]

            await until(lambda: row().load.role_budgets == RoleBudgets(256, 0), 10)
            with pytest.raises(Unavailable, match="its budget is 0 answers"):
                await answer(row(), token)
            servicer.set_role_budgets(row(), RoleBudgets(128, 16))
            await until(lambda: row().load.role_budgets == RoleBudgets(128, 16), 10)
            assert await answer(row(), token) == CASE["tokens"][:NUM_TOKENS]
            servicer.set_role_budgets(row(), RoleBudgets(128, 0))
            await until(lambda: row().load.role_budgets == RoleBudgets(128, 0), 10)
            with pytest.raises(Unavailable, match="its budget is 0 answers"):
                await answer(row(), token)
            load = row().load
            assert load.totals.draft_tokens >= load.totals.accepted_tokens
            assert load.held_blocks == 0
        finally:
            process.terminate()
            begun_s = time.monotonic()
            assert await asyncio.to_thread(process.wait, 20) == 0
            assert time.monotonic() - begun_s < 15
