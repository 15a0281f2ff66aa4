"""Leases of other callers, over gRPC: no effect, a true response, a count and a log line."""

import asyncio
import json
import secrets
from collections import Counter
from io import StringIO

import pytest

from engine.base.option_groups import LogOptions
from engine.pb.diptych.internal.v1 import worker_pb2 as pb
from engine.pb.diptych.internal.v1.worker_pb2_grpc import KvServiceStub
from engine.rpc.channel import open_channel
from engine.rpc.server import RpcServer
from engine.telemetry.log import configure_logging
from kvtransfer.kv_service import KvServicer
from kvtransfer.lease import LEASE_ID_BYTES, LeaseTable, Refusal

TTL_S = 10.0


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Blocks:
    """Pins of two blocks."""

    def __init__(self):
        self.pins = Counter()

    async def hold(self, hashes):
        block_ids = [int(block_hash) for block_hash in hashes]
        self.pins.update(block_ids)
        return block_ids, [7] * len(block_ids)

    async def unpin(self, block_ids):
        self.pins.subtract(block_ids)


@pytest.fixture
async def kv():
    clock, blocks, refused, lines = Clock(), Blocks(), Counter(), StringIO()
    configure_logging(LogOptions(log_format="json"), stream=lines)
    table = LeaseTable(clock, TTL_S)
    count = lambda reason, number: refused.update({reason: number})  # noqa: E731
    servicer = KvServicer(None, "digest", blocks, table, count)
    server = RpcServer()
    server.add_service(pb.DESCRIPTOR.services_by_name["KvService"], servicer)
    port = server.listen("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield KvServiceStub(channel), table, clock, blocks, refused, lines
    await server.stop()


async def hold(stub, owner="owner"):
    return (await stub.Hold(pb.HoldRequest(caller_incarnation=owner, hashes=[b"1", b"2"]))).lease


async def use(stub, owner, *leases):
    """Renew and release; returns those that Renew did not know."""
    renewed = await stub.Renew(pb.RenewRequest(caller_incarnation=owner, leases=leases))
    await stub.Release(pb.ReleaseRequest(caller_incarnation=owner, leases=leases))
    return list(renewed.unknown)


def forgeries(lease):
    """Ids that an attacker might try after seeing one."""
    flipped = bytes([lease[0] ^ 1]) + lease[1:]
    return [secrets.token_bytes(LEASE_ID_BYTES), b"", lease[:-1], lease + b"\0", flipped]


async def test_forged_and_foreign_leases_have_no_effect(kv):
    stub, table, clock, blocks, refused, lines = kv
    lease = await hold(stub)
    forged = forgeries(lease)
    clock.now += TTL_S / 2
    assert await use(stub, "owner", *forged) == forged
    assert refused == {"unknown": 2 * len(forged)}
    assert await use(stub, "thief", lease) == [lease]
    assert refused["foreign"] == 2
    assert blocks.pins == {1: 1, 2: 1}
    clock.now += TTL_S / 2
    assert [ended.id for ended in table.expire()] == [lease], "no forgery prolonged it"
    text = lines.getvalue()
    logged = [json.loads(line) for line in text.splitlines() if "leases refused" in line]
    assert [line["level"] for line in logged] == ["info", "info", "warning", "warning"]
    assert all("'thief'" in line["event"] and "127.0.0.1" in line["event"] for line in logged[2:])
    assert lease.hex() not in text and repr(lease)[2:-1] not in text


async def test_replayed_and_expired_leases_have_no_effect(kv):
    stub, table, clock, blocks, refused, _ = kv
    first, second = await hold(stub), await hold(stub)
    assert await use(stub, "owner", first) == []
    assert blocks.pins == {1: 1, 2: 1} and not refused
    assert await use(stub, "owner", first) == [first], "it has ended"
    assert blocks.pins == {1: 1, 2: 1} and refused == {"unknown": 2}
    clock.now += TTL_S
    renewed = await stub.Renew(pb.RenewRequest(caller_incarnation="owner", leases=[second]))
    assert list(renewed.unknown) == [second]
    assert refused == {"unknown": 2, "expired": 1}
    assert [lease.id for lease in table.expire()] == [second]


async def test_leases_among_others_are_used_all_the_same(kv):
    stub, _, _, blocks, refused, _ = kv
    mine, other = await hold(stub), await hold(stub, "other")
    assert await use(stub, "owner", b"x" * 16, mine, other) == [b"x" * 16, other]
    assert blocks.pins == {1: 1, 2: 1}
    # Refused twice each: by Renew and by Release.
    assert refused == {"unknown": 2, "foreign": 2}


async def test_many_callers_at_once_end_a_lease_once(kv):
    stub, table, _, blocks, refused, _ = kv
    lease = await hold(stub)
    request = pb.ReleaseRequest(caller_incarnation="owner", leases=[lease])
    await asyncio.gather(*(stub.Release(request) for _ in range(20)))
    assert not +blocks.pins and not len(table)
    assert refused == {"unknown": 19}


def test_reasons():
    clock = Clock()
    table = LeaseTable(clock, TTL_S)
    lease = table.grant("owner", [1]).id
    assert table.refusal("owner", lease) is None
    assert table.refusal("other", lease) is Refusal.FOREIGN
    assert table.refusal("owner", lease[::-1]) is Refusal.UNKNOWN
    clock.now += TTL_S
    assert table.refusal("owner", lease) is Refusal.EXPIRED
    assert table.refusal("other", lease) is Refusal.FOREIGN
    table.expire()
    assert table.refusal("owner", lease) is Refusal.UNKNOWN
