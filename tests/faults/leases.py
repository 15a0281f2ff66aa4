"""Callers of a worker's internal services, other than its peers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from engine.pb.diptych.internal.v1 import worker_pb2, worker_pb2_grpc
from engine.rpc.channel import open_channel
from tests.faults.oracle import CASES
from tests.faults.scenario import Scenario, fresh_salt

_BLOCK = 16


@asynccontextmanager
async def calls(scenario: Scenario, name: str) -> AsyncIterator[tuple[Any, Any]]:
    """Stubs of a worker's PrefillService and KvService."""
    async with open_channel(scenario.cluster.address(name)) as channel:
        yield worker_pb2_grpc.PrefillServiceStub(channel), worker_pb2_grpc.KvServiceStub(channel)


def prompt(owner: str, salt: str, num_blocks: int) -> worker_pb2.PrefillRequest:
    """So many whole blocks to compute for `owner`."""
    return worker_pb2.PrefillRequest(
        request_id=f"lease-of-{owner}",
        caller_incarnation=owner,
        token_ids=CASES["long-0"].prompt[: num_blocks * _BLOCK],
        cache_salt=salt,
    )


@asynccontextmanager
async def leased(
    scenario: Scenario, prefill: Any, owner: str, num_blocks: int, salt: str | None = None
) -> AsyncIterator[list[worker_pb2.BlocksReady]]:
    """Leases on so many blocks, as long as the call that they are from."""
    request = prompt(owner, fresh_salt() if salt is None else salt, num_blocks)
    call = prefill.Prefill(request, timeout=30, metadata=scenario.cluster.token)
    announced: list[worker_pb2.BlocksReady] = []
    try:
        async for response in call:
            if response.HasField("ready"):
                announced.append(response.ready)
            if sum(len(ready.block_ids) for ready in announced) == num_blocks:
                yield announced
                return
        raise AssertionError(f"{announced} blocks were announced to {owner}, expected {num_blocks}")
    finally:
        call.cancel()
