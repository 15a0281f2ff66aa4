"""KvService over a real gRPC server: handshakes, leases, expiry without the scheduler, renewals."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress

import grpc
import pytest

from engine.base.kv_layout import LayerGroup
from engine.pb.diptych.internal.v1 import worker_pb2 as pb
from engine.pb.diptych.internal.v1.worker_pb2_grpc import (
    KvServiceStub,
    add_KvServiceServicer_to_server,
)
from kvtransfer.handshake import pool_of
from kvtransfer.kv_service import KvServicer, Renewer
from kvtransfer.lease import LeaseTable
from kvtransfer.transport import Agent, MemoryRegion, Region, RemotePool

GROUPS = (LayerGroup(0, 2, 16, 0), LayerGroup(0, 1, 32, 32))
POOL = RemotePool(
    "me",
    10,
    (
        Region("blocks", 0, "me.1", 64, MemoryRegion(4096, 640), GROUPS),
        Region("generations", 0, "me.1", 8, MemoryRegion(8192, 80)),
    ),
    (Agent("me.1", b"metadata"),),
)


class Host:
    """Ten hashed blocks; counts pins as the block pool does."""

    def __init__(self) -> None:
        self.pins: Counter[int] = Counter()
        self.slow = asyncio.Event()
        self.slow.set()
        self.num_expired = 0

    def expired(self) -> None:
        self.num_expired += 1

    async def hold(self, hashes: Sequence[bytes]) -> tuple[list[int], list[int]]:
        block_ids = []
        for block_hash in hashes:
            if not block_hash.isdigit():
                break
            block_ids.append(int(block_hash))
        self.pins.update(block_ids)
        await self.slow.wait()
        return block_ids, [100 + i for i in block_ids]

    async def unpin(self, block_ids: Sequence[int]) -> None:
        self.pins.subtract(block_ids)
        assert all(count >= 0 for count in self.pins.values())


@asynccontextmanager
async def serving(ttl_s: float) -> AsyncIterator[tuple[KvServiceStub, KvServicer, Host]]:
    host = Host()
    leases = LeaseTable(time.monotonic, ttl_s)
    servicer = KvServicer(lambda: POOL, "digest", host, leases, on_expired=host.expired)
    server = grpc.aio.server()
    add_KvServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    reaper = asyncio.create_task(servicer.reap())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield KvServiceStub(channel), servicer, host
    reaper.cancel()
    with suppress(asyncio.CancelledError):
        await reaper
    await server.stop(None)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110, there is no event
            await asyncio.sleep(0.01)


async def at_rest(host: Host) -> None:
    await until(lambda: host.pins.total() == 0)


async def test_handshake_compares_the_digest_first() -> None:
    async with serving(ttl_s=5) as (stub, _, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Handshake(pb.HandshakeRequest(digest="other"))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "digest" in caught.value.details() and "other" in caught.value.details()
        request = pb.HandshakeRequest(digest="digest", caller_incarnation="you")
        response = await stub.Handshake(request)
        assert response.incarnation == "me" and response.num_blocks == 10
        assert [(a.name, a.metadata) for a in response.agents] == [("me.1", b"metadata")]
        blocks, generations = response.regions
        assert (blocks.kind, generations.kind) == (
            pb.Region.KIND_BLOCKS,
            pb.Region.KIND_GENERATIONS,
        )
        assert blocks.memory == pb.Memory(address=4096, num_bytes=640, kind="DRAM")
        assert (blocks.stride, generations.stride) == (64, 8)
        assert [group.offset for group in blocks.groups] == [0, 32]
        assert pool_of(response) == POOL


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Handshake", pb.HandshakeRequest(digest="digest")),
        ("Hold", pb.HoldRequest(hashes=[b"1"])),
        ("Renew", pb.RenewRequest()),
        ("Release", pb.ReleaseRequest()),
    ],
)
async def test_a_caller_without_a_name_is_refused(method: str, request_: object) -> None:
    async with serving(ttl_s=5) as (stub, _, host):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(stub, method)(request_)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "caller_incarnation" in caught.value.details()
        assert not host.pins.total()


async def test_hold_pins_a_leading_run_until_its_owner_releases_it() -> None:
    async with serving(ttl_s=5) as (stub, _, host):
        hashes = [b"1", b"2", b"x", b"3"]
        held = await stub.Hold(pb.HoldRequest(caller_incarnation="you", hashes=hashes))
        assert (list(held.block_ids), list(held.generations)) == ([1, 2], [101, 102])
        assert host.pins == {1: 1, 2: 1}
        await stub.Release(pb.ReleaseRequest(caller_incarnation="thief", leases=[held.lease]))
        assert host.pins.total() == 2
        for _ in range(2):  # idempotent
            await stub.Release(pb.ReleaseRequest(caller_incarnation="you", leases=[held.lease]))
            assert host.pins.total() == 0
        nothing = await stub.Hold(pb.HoldRequest(caller_incarnation="you", hashes=[b"x"]))
        assert nothing.lease == b"" and not nothing.block_ids


async def test_leases_run_out_without_anybody_asking() -> None:
    async with serving(ttl_s=0.3) as (stub, servicer, host):
        held = await stub.Hold(pb.HoldRequest(caller_incarnation="you", hashes=[b"1"]))
        await host.hold([b"2"])
        announced = servicer.table.grant("you", [2])
        await at_rest(host)
        request = pb.RenewRequest(caller_incarnation="you", leases=[held.lease, announced.id])
        assert list((await stub.Renew(request)).unknown) == [held.lease, announced.id]


async def test_a_hold_whose_caller_vanishes_midway_is_reaped_and_counted() -> None:
    async with serving(ttl_s=0.3) as (stub, _, host):
        host.slow.clear()
        call = stub.Hold(pb.HoldRequest(caller_incarnation="you", hashes=[b"1"]))
        await until(lambda: host.pins.total() == 1)
        call.cancel()
        await asyncio.sleep(0.1)
        host.slow.set()
        await at_rest(host)
        assert host.num_expired == 1


async def test_renewer_keeps_leases_alive_until_released() -> None:
    async with serving(ttl_s=0.4) as (stub, _, host):
        renewer = Renewer(stub, "you")
        ends_at = time.monotonic() + 1.5
        number = 0
        while time.monotonic() < ends_at:  # new leases all the time must not put renewals off
            block_hash = b"%d" % (number % 10)
            held = await stub.Hold(pb.HoldRequest(caller_incarnation="you", hashes=[block_hash]))
            renewer.hold(held.lease, held.ttl_s)
            number += 1
            await asyncio.sleep(0.05)
        assert host.pins.total() == number == len(renewer.leases)
        assert await renewer.release(renewer.leases[0])
        assert host.pins.total() == number - 1
        await renewer.close()
        assert host.pins.total() == 0


async def test_renewer_drops_what_the_peer_does_not_know() -> None:
    async with serving(ttl_s=0.5) as (stub, servicer, _):
        held = await stub.Hold(pb.HoldRequest(caller_incarnation="you", hashes=[b"1"]))
        kept = await stub.Hold(pb.HoldRequest(caller_incarnation="you", hashes=[b"2"]))
        renewer = Renewer(stub, "you")
        renewer.hold(held.lease, held.ttl_s)
        renewer.hold(kept.lease, kept.ttl_s)
        await servicer.release("you", [held.lease])
        await until(lambda: renewer.leases == (kept.lease,))
    # The server is gone: the renewer goes on, and a release returns that it did not arrive.
    await asyncio.sleep(0.3)
    assert renewer.leases == (kept.lease,)
    assert not await renewer.release(kept.lease, timeout_s=0.5)
    await renewer.close()


async def test_renewer_goes_on_after_a_time_without_leases() -> None:
    """A lease that ended while the renewer slept must not end the renewer."""
    async with serving(ttl_s=0.6) as (stub, _, host):
        renewer = Renewer(stub, "you")
        first = await stub.Hold(pb.HoldRequest(caller_incarnation="you", hashes=[b"1"]))
        renewer.hold(first.lease, first.ttl_s)
        await asyncio.sleep(0.05)
        await renewer.release(first.lease)
        await asyncio.sleep(0.4)
        held = await stub.Hold(pb.HoldRequest(caller_incarnation="you", hashes=[b"2"]))
        renewer.hold(held.lease, held.ttl_s)
        await asyncio.sleep(1.2)
        assert host.pins[2] == 1 and renewer.leases == (held.lease,)
        await renewer.close()
