"""Real NIXL between real processes: every byte, every death, and the fence's race."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import shared_memory

import grpc
import numpy as np
import pytest

from engine.base.errors import Mismatch
from engine.base.types import Peer
from engine.pb.diptych.internal.v1.worker_pb2_grpc import KvServiceStub
from kvtransfer.fence import Fence
from kvtransfer.peers import PeerTable
from kvtransfer.transport import PeerLost, PullTimeout
from tests.support import kv_worker

NUM_BLOCKS, BLOCK_BYTES = 64, 36_864
pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def local() -> Iterator[kv_worker.Pool]:
    pool = kv_worker.Pool(NUM_BLOCKS, BLOCK_BYTES)
    yield pool
    pool.plane.stop()


def test_random_maps_are_equal_in_every_byte(local: kv_worker.Pool) -> None:
    rng = random.Random(7)
    with kv_worker.workers(2, NUM_BLOCKS, BLOCK_BYTES) as peers:
        pools = []
        for peer in peers:
            pool, _ = peer.ask("pool")
            local.plane.connect(pool).result(10)
            pools.append(pool)
        for seed in range(12):
            generations = [peer.ask("fill", 2 * seed + i) for i, peer in enumerate(peers)]
            content = [kv_worker.pattern(2 * seed + i, (NUM_BLOCKS, BLOCK_BYTES)) for i in range(2)]
            local.blocks[:] = 0
            wanted = np.zeros_like(local.blocks)
            targets = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS // 2)
            pulls = []
            for i, mine in enumerate((targets[::2], targets[1::2])):
                source = rng.sample(range(NUM_BLOCKS), len(mine))
                wanted[mine] = content[i][source]
                told = [generations[i][block] for block in source]
                pulls.append(local.plane.pull(pools[i], source, mine, told, 30))
            for pull in pulls:
                assert pull.done.result(30).stale == ()
                pull.settled.result(30)
            assert (local.blocks == wanted).all()  # untouched blocks included


def test_adjacent_blocks_coalesce(local: kv_worker.Pool) -> None:
    with kv_worker.workers(1, NUM_BLOCKS, BLOCK_BYTES) as (peer,):
        pool, _ = peer.ask("pool")
        told = peer.ask("fill", 3)
        local.plane.connect(pool).result(10)
        source, target = [*range(10, 30), 40, *range(50, 60)], list(range(31))
        pull = local.plane.pull(pool, source, target, [told[i] for i in source], 30)
        result = pull.done.result(30)
        assert (result.num_blocks, result.num_extents, result.stale) == (31, 3, ())
        content = kv_worker.pattern(3, (NUM_BLOCKS, BLOCK_BYTES))
        assert (local.blocks[:31] == content[source]).all()


def test_the_lane_and_the_speed_of_real_reads_are_known(local: kv_worker.Pool) -> None:
    with kv_worker.workers(1, NUM_BLOCKS, BLOCK_BYTES) as (peer,):
        pool, _ = peer.ask("pool")
        told = peer.ask("fill", 3)
        local.plane.connect(pool).result(10)
        blocks = list(range(NUM_BLOCKS))
        local.plane.pull(pool, blocks, blocks, told, 30).done.result(30)
        until_s = time.monotonic() + 10
        while not (link := local.plane.links()[pool.incarnation]).lane:
            assert time.monotonic() < until_s
            time.sleep(0.02)
    assert re.search("cma/memory|tcp/|posix/|sysv/", link.lane)
    assert link.num_bytes == NUM_BLOCKS * BLOCK_BYTES and link.bytes_per_s > 1e6


def test_reused_blocks_are_reported_by_index(local: kv_worker.Pool) -> None:
    with kv_worker.workers(1, NUM_BLOCKS, BLOCK_BYTES) as (peer,):
        pool, told = peer.ask("pool")
        now = peer.ask("fill", 1)
        local.plane.connect(pool).result(10)
        mixed = [now[0], told[1], now[2], told[3]]
        pull = local.plane.pull(pool, [0, 1, 2, 3], [5, 6, 7, 8], mixed, 30)
        assert pull.done.result(30).stale == (1, 3)
        pull.settled.result(30)
        assert local.plane.counters.num_stale_blocks == 2


def test_peer_killed_before_and_between_reads(local: kv_worker.Pool) -> None:
    with kv_worker.workers(3, NUM_BLOCKS, BLOCK_BYTES) as peers:
        pools, told = zip(*(peer.ask("pool") for peer in peers), strict=True)
        for pool in pools:
            local.plane.connect(pool).result(10)
        blocks = list(range(NUM_BLOCKS))
        local.plane.pull(pools[0], blocks, blocks, told[0], 30).done.result(30)
        peers[0].kill()  # connected already
        peers[1].kill()  # never read from
        for dead in (0, 1):
            pull = local.plane.pull(pools[dead], blocks, blocks, told[dead], 20)
            with pytest.raises((PeerLost, PullTimeout)) as caught:
                pull.done.result(25)
            assert dead == 1 or caught.type is PeerLost
            pull.settled.result(30)
        pull = local.plane.pull(pools[2], blocks, blocks, told[2], 30)
        assert pull.done.result(30).stale == ()


def test_peer_killed_while_it_is_read(local: kv_worker.Pool) -> None:
    """Pulls follow each other without a pause; the kill falls into one of them."""
    with kv_worker.workers(2, NUM_BLOCKS, BLOCK_BYTES) as peers:
        pools, told = zip(*(peer.ask("pool") for peer in peers), strict=True)
        for pool in pools:
            local.plane.connect(pool).result(10)
        blocks = list(range(NUM_BLOCKS))
        half = NUM_BLOCKS // 2
        num_good, killed_at = 0, 0.0
        with pytest.raises(PeerLost):
            while True:
                doomed = local.plane.pull(
                    pools[0], blocks[:half], blocks[:half], told[0][:half], 20
                )
                other = local.plane.pull(pools[1], blocks[half:], blocks[half:], told[1][half:], 20)
                if num_good == 20:
                    killed_at = time.monotonic()
                    peers[0].process.kill()
                assert other.done.result(20).stale == ()
                doomed.done.result(20)
                num_good += 1
        assert num_good >= 20
        assert time.monotonic() - killed_at < 10
        doomed.settled.result(20)
        other = local.plane.pull(pools[1], blocks, blocks, told[1], 20)
        assert other.done.result(20).stale == ()


def test_hanging_peer_times_out_and_keeps_its_destination(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TCP the target must take part: stop it, and the read hangs until it goes on or dies."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    local = kv_worker.Pool(NUM_BLOCKS, BLOCK_BYTES)
    with kv_worker.workers(2, NUM_BLOCKS, BLOCK_BYTES, {"UCX_TLS": "tcp"}) as peers:
        pools, told = zip(*(peer.ask("pool") for peer in peers), strict=True)
        blocks = list(range(NUM_BLOCKS))
        for pool, gens in zip(pools, told, strict=True):
            local.plane.connect(pool).result(10)
            local.plane.pull(pool, blocks, blocks, gens, 30).done.result(30)
        for peer, end in zip(peers, ("resume", "kill"), strict=True):
            i = peers.index(peer)
            peer.pause()
            pull = local.plane.pull(pools[i], blocks, blocks, told[i], 0.5)
            with pytest.raises(PullTimeout):
                pull.done.result(5)
            time.sleep(0.3)
            assert not pull.settled.done()
            assert local.plane.counters.num_quarantined_blocks == NUM_BLOCKS
            getattr(peer, end)()
            pull.settled.result(20)
        assert local.plane.stop()


async def test_handshakes(local: kv_worker.Pool) -> None:
    """Concurrent callers share one; a wrong digest or incarnation is refused; peers are bounded."""
    channels: dict[str, grpc.aio.Channel] = {}
    calls: list[str] = []

    def stub(address: str) -> KvServiceStub:
        calls.append(address)
        channels.setdefault(address, grpc.aio.insecure_channel(address))
        return KvServiceStub(channels[address])

    with kv_worker.workers(3, NUM_BLOCKS, BLOCK_BYTES) as peers:
        table = PeerTable(local.plane, digest="d1", stub_factory=stub, max_peers=2)
        known = []
        for i, peer in enumerate(peers):
            pool, _ = peer.ask("pool")
            address = peer.ask("listen", "d1")
            known.append(Peer(f"w{i}", pool.incarnation, address))
        first = await asyncio.gather(*(table.connect(known[0]) for _ in range(5)))
        assert len(calls) == 1 and all(pool == first[0] for pool in first)

        other = peers[1].ask("listen", "d2")
        with pytest.raises(Mismatch, match=r"d2.*d1"):
            await table.connect(Peer("w1", known[1].incarnation, other))
        with pytest.raises(PeerLost, match=known[0].incarnation):
            await table.connect(Peer("w9", "someone-else", known[0].address))
        with pytest.raises(PeerLost):
            await table.connect(Peer("w9", "absent", "127.0.0.1:9"))

        for peer in known:
            await table.connect(peer)
        await asyncio.sleep(0.2)
        assert len(table) == 2
        dropped = local.plane.pull(first[0], [0], [0], [0], 5)
        with pytest.raises(PeerLost, match="not connected"):
            dropped.done.result(5)

        # The dropped one, and one that was forgotten, come back as if new.
        await table.forget(await table.connect(known[2]))
        for i in (0, 2):
            pool = await table.connect(known[i])
            told = peers[i].ask("fill", 40 + i)
            pull = local.plane.pull(pool, [0, 1], [0, 1], told[:2], 20)
            assert pull.done.result(20).stale == ()
            content = kv_worker.pattern(40 + i, (NUM_BLOCKS, BLOCK_BYTES))
            assert (local.blocks[:2] == content[:2]).all()
    for channel in channels.values():
        await channel.close()


async def test_a_restart_on_the_same_address_is_somebody_else(local: kv_worker.Pool) -> None:
    blocks = list(range(NUM_BLOCKS))
    with kv_worker.workers(2, NUM_BLOCKS, BLOCK_BYTES) as (before, after):
        address = before.ask("listen", "d")
        async with grpc.aio.insecure_channel(address) as channel:
            table = PeerTable(
                local.plane, digest="d", stub_factory=lambda _: KvServiceStub(channel)
            )
            names = [worker.ask("pool")[0].incarnation for worker in (before, after)]
            pool = await table.connect(Peer("w", names[0], address))
            told = before.ask("fill", 1)
            assert local.plane.pull(pool, blocks, blocks, told, 20).done.result(20).stale == ()
            before.kill()
            assert after.ask("listen", "d", int(address.rpartition(":")[2])) == address
            with pytest.raises(PeerLost):
                local.plane.pull(pool, blocks, blocks, told, 20).done.result(20)
            await table.forget(pool)
            deadline = time.monotonic() + 20
            while True:  # the channel needs a moment to see that it must dial anew
                with pytest.raises(PeerLost) as caught:
                    await table.connect(Peer("w", names[0], address))
                if names[1] in str(caught.value):
                    break
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            pool = await table.connect(Peer("w", names[1], address))
            told = after.ask("fill", 2)
            assert local.plane.pull(pool, blocks, blocks, told, 20).done.result(20).stale == ()
            assert (local.blocks == kv_worker.pattern(2, local.blocks.shape)).all()


# -- the race ------------------------------------------------------------------------------

RACE_BLOCK_BYTES = 8 << 20


@dataclass
class Race:
    """What happened over all tries: block 0 was flipped once in each, at a random moment."""

    num_tries: int = 0
    num_torn: int = 0  # the bytes read were partly old, partly new
    num_clean: int = 0  # the pull was passed as not stale
    num_poisoned: int = 0  # passed, and not exactly the old bytes


def race(*, fence: Fence, min_tries: int, share: float, limit_s: float) -> Race:
    """Pull block 0 while its owner reuses it, until there were enough tries of both kinds."""
    rng = random.Random(11)
    outcome = Race()
    local = kv_worker.Pool(1, RACE_BLOCK_BYTES, fence=fence)
    page = shared_memory.SharedMemory(create=True, size=4096)
    control = np.frombuffer(page.buf, dtype=np.uint64)
    words = local.blocks[0].view(np.uint64)
    try:
        with kv_worker.workers(1, 1, RACE_BLOCK_BYTES) as (owner,):
            pool, (generation,) = owner.ask("pool")
            local.plane.connect(pool).result(10)
            local.plane.pull(pool, [0], [0], [generation], 30).done.result(30)
            control[:] = 0
            owner.pipe.send(("race", page.name))
            old = 0  # the pool starts as zeros
            aim_s = 1e-3  # once tuned, a flip this long after the read is asked for tears it
            step = 0.05
            took_s = deque([10e-3], maxlen=30)
            ends_at = time.monotonic() + limit_s
            while time.monotonic() < ends_at:
                number = outcome.num_tries + 1
                want_clean = outcome.num_clean < outcome.num_tries * 0.3
                delay_s = (
                    1.5 * max(took_s)
                    if want_clean
                    else aim_s + rng.uniform(-0.1, 0.1) * min(took_s)
                )
                began_at = time.monotonic()
                control[kv_worker.DELAY_NS] = int(max(delay_s, 0.0) * 1e9)
                control[kv_worker.FLIP_NS] = int(rng.uniform(0.0, 5.0) * min(took_s) * 1e9)
                control[kv_worker.WANTED] = number
                while time.monotonic() < began_at - delay_s:
                    pass  # a negative delay: the flip comes first
                result = local.plane.pull(pool, [0], [0], [generation], 30).done.result(30)
                took_s.append(time.monotonic() - began_at)
                while int(control[kv_worker.DONE]) != number:
                    time.sleep(0)
                is_old = words == np.uint64(old)
                all_old, any_old = bool(is_old.all()), bool(is_old.any())
                outcome.num_tries += 1
                torn = any_old and not all_old
                outcome.num_torn += torn
                if not result.stale:
                    outcome.num_clean += 1
                    outcome.num_poisoned += not all_old
                if torn:
                    step = 0.05
                elif (
                    not want_clean
                ):  # search faster, the longer the flips come too late or too early
                    aim_s += step * min(took_s) * (-1 if all_old else 1)
                    step = min(step * 1.3, 0.5)
                old = kv_worker.word(number)
                generation = (generation + 1) & (2**64 - 1)
                enough = share * outcome.num_tries
                if number >= min_tries and min(outcome.num_torn, outcome.num_clean) >= enough:
                    break
            control[kv_worker.WANTED] = kv_worker.STOP
            assert owner.pipe.poll(10)
    finally:
        local.plane.stop()
        del control
        page.close()
        page.unlink()
    return outcome


def test_no_poison_is_ever_committed() -> None:
    outcome = race(fence=Fence(), min_tries=1_000, share=0.2, limit_s=60)
    print(outcome)
    assert outcome.num_tries >= 1_000
    assert outcome.num_torn >= 0.2 * outcome.num_tries
    assert outcome.num_clean >= 0.2 * outcome.num_tries
    assert outcome.num_poisoned == 0


def test_without_the_comparison_poison_is_committed() -> None:
    outcome = race(fence=Fence(enabled=False), min_tries=100, share=0.05, limit_s=20)
    print(outcome)
    assert outcome.num_poisoned > 0
