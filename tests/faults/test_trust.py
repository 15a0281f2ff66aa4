"""Processes that do not belong here: workers of another model, precision or block size, and callers
with leases that are not theirs.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from engine.pb.diptych.internal.v1 import worker_pb2
from tests.faults import checks
from tests.faults.leases import calls, leased, prompt
from tests.faults.scenario import Scenario, fresh_salt
from tests.support.cluster import NATIVE
from tests.support.process_slots import End

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True, slots=True)
class Stranger:
    """A worker that does not fit, and the word in its refusal."""

    role: str
    flags: tuple[str, ...]
    field: str


STRANGERS = {
    "weights": Stranger("decode", ("--seed-weights", "5"), "numeric_profile"),
    "dtype": Stranger(
        "prefill", ("--dtype", "float32" if NATIVE else "bfloat16"), "numeric_profile"
    ),
    "block-size": Stranger("decode", ("--block-size", "32"), "block_size"),
}
NUM_BLOCKS = 4
P = "prefill-0"


async def test_wrong_weights_dtype_and_block_size(scenario: Scenario) -> None:
    """Each is refused at registration, the reason by name, ends with status 2, serves nothing."""
    strangers = list(STRANGERS) if scenario.full else ["weights"]  # and tests/system has all
    names = {what: f"{STRANGERS[what].role}-{what}" for what in strangers}
    for what, name in names.items():
        place = scenario.cluster.add_worker(
            name, "--kv-cache-memory", "128MiB", *STRANGERS[what].flags
        )
        place.held = False
    try:
        for what, name in names.items():
            place = scenario.cluster[name]
            await scenario.until(lambda p=place: bool(p.ends), 60, f"{name} is refused")
            place.held = place.wanted = True
            assert place.ends[0] == End(2, wanted=False), scenario.cluster.tail(name)
            said = scenario.cluster.tail(name, 5)
            assert "refused by coordinator" in said and STRANGERS[what].field in said, said
            assert name not in scenario.cluster.rows()
    finally:
        for name in names.values():
            await scenario.take_down([name])
            scenario.cluster.forget(name)
    await scenario.finish()


async def test_a_peer_of_another_model_is_refused_before_anything_else(alone: Scenario) -> None:
    """A handshake with another digest tells nothing of our memory."""
    async with calls(alone, P) as (_, kv):
        request = worker_pb2.HandshakeRequest(digest="another", caller_incarnation="stranger")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await kv.Handshake(request, timeout=10, metadata=alone.cluster.token)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    await alone.finish()


async def test_forged_leases(alone: Scenario) -> None:
    """A lease that was never granted opens nothing and ends nothing."""
    scenario = alone
    async with calls(scenario, P) as (prefill, kv), _leased(scenario, prefill, "owner") as lease:
        forged = [secrets.token_bytes(16), b"", lease[:-1], bytes(16)]
        assert await _renew(scenario, kv, "owner", forged) == forged
        await _release(scenario, kv, "owner", forged)
        assert checks.num_held(scenario.cluster.http(P)) == NUM_BLOCKS
        assert await _renew(scenario, kv, "owner", [lease]) == []
        scenario.moved(P, "kv_lease_refusals_total{reason=unknown}", at_least=2 * len(forged))
    await scenario.finish()


async def test_foreign_leases(alone: Scenario) -> None:
    """Another's lease, even if overheard, cannot be renewed or ended by others."""
    scenario = alone
    async with calls(scenario, P) as (prefill, kv), _leased(scenario, prefill, "owner") as lease:
        assert await _renew(scenario, kv, "thief", [lease]) == [lease]
        await _release(scenario, kv, "thief", [lease])
        assert checks.num_held(scenario.cluster.http(P)) == NUM_BLOCKS
        assert await _renew(scenario, kv, "owner", [lease]) == []
        scenario.moved(P, "kv_lease_refusals_total{reason=foreign}", at_least=2)
    await scenario.finish()


async def test_replayed_leases(alone: Scenario) -> None:
    """A release that is said again does not touch the blocks' next lease."""
    scenario = alone
    salt = fresh_salt()
    async with calls(scenario, P) as (prefill, kv):
        async with _leased(scenario, prefill, "owner", salt) as old:
            await _release(scenario, kv, "owner", [old])
            async with _leased(scenario, prefill, "owner", salt) as new:
                assert new != old
                for _ in range(3):
                    await _release(scenario, kv, "owner", [old])
                assert await _renew(scenario, kv, "owner", [old]) == [old]
                assert checks.num_held(scenario.cluster.http(P)) == NUM_BLOCKS
                assert await _renew(scenario, kv, "owner", [new]) == []
        scenario.moved(P, "kv_lease_refusals_total{reason=unknown}", at_least=4)
    await scenario.finish()


async def test_callers_without_the_token(alone: Scenario) -> None:
    """Neither memory, nor leases, nor work for a process that is not of this cluster."""
    scenario = alone
    async with calls(scenario, P) as (prefill, kv):
        for metadata, code in (
            ((), grpc.StatusCode.UNAUTHENTICATED),
            ((("authorization", "Bearer " + "x" * 64),), grpc.StatusCode.PERMISSION_DENIED),
        ):
            tried = (
                kv.Handshake(
                    worker_pb2.HandshakeRequest(caller_incarnation="x"),
                    timeout=10,
                    metadata=metadata,
                ),
                kv.Release(
                    worker_pb2.ReleaseRequest(caller_incarnation="x"), timeout=10, metadata=metadata
                ),
                _first(prefill.Prefill(prompt("x", "", NUM_BLOCKS), timeout=10, metadata=metadata)),
            )
            for call in tried:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is code
    await scenario.finish()


@asynccontextmanager
async def _leased(
    scenario: Scenario, prefill: Any, owner: str, salt: str | None = None
) -> AsyncIterator[bytes]:
    """A lease on a few blocks, as long as its call."""
    async with leased(scenario, prefill, owner, NUM_BLOCKS, salt) as announced:
        (ready,) = announced
        yield ready.lease


async def _first(call: Any) -> Any:
    return await call.read()


async def _renew(scenario: Scenario, kv: Any, owner: str, leases: list[bytes]) -> list[bytes]:
    request = worker_pb2.RenewRequest(caller_incarnation=owner, leases=leases)
    answer = await kv.Renew(request, timeout=10, metadata=scenario.cluster.token)
    return list(answer.unknown)


async def _release(scenario: Scenario, kv: Any, owner: str, leases: list[bytes]) -> None:
    request = worker_pb2.ReleaseRequest(caller_incarnation=owner, leases=leases)
    await kv.Release(request, timeout=10, metadata=scenario.cluster.token)
