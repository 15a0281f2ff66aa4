"""A bit that flips between two memories: found with checksums, in the output without."""

from __future__ import annotations

import asyncio
import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from engine.base.errors import Unavailable
from engine.base.kv_layout import KVLayout
from engine.base.option_groups import TransferOptions
from engine.cache.kv_cache import KVCache
from engine.pb.diptych.internal.v1 import worker_pb2, worker_pb2_grpc
from kvtransfer.checksum import Checksums
from kvtransfer.transport import ReadState
from tests.support.worker_pair import (
    Ask,
    PairedWorker,
    answer,
    assert_at_rest,
    collect,
    decode_stub,
    pair,
)

pytestmark = pytest.mark.timeout(60)
LONG = tuple(range(41))
ON = {"transfer": TransferOptions(kv_checksums=True)}


def test_a_block_is_all_its_bytes_and_no_others() -> None:
    """Both models' layers, in place on a CPU: what NIXL moves is what is checked."""
    draft = KVLayout(1, 1, 8, 4, "float32")
    layout = KVLayout(2, 2, 8, 4, "float32", draft=draft)
    cache = KVCache(layout, 3, torch.device("cpu"))
    cache._memory[:] = torch.randn(cache._memory.shape)
    block = cache.read_block(1)
    assert block.nbytes == layout.block_bytes
    raw = (ctypes.c_char * layout.block_bytes).from_address(cache.address + layout.block_bytes)
    assert bytes(block) == bytes(raw)
    checksums = Checksums(cache.read_block)
    before = checksums.compute([0, 1, 2])
    assert cache.draft is not None
    for pool, changed in ((cache.pool, 1), (cache.draft.pool, 2)):
        pool[changed, 0, 0, 1, 2, 3] += 1
        after = checksums.compute([0, 1, 2])
        assert [a != b for a, b in zip(before, after, strict=True)].index(True) == changed
        before = after


async def test_every_single_flipped_bit_of_a_block_is_found() -> None:
    memory = np.random.default_rng(3).integers(0, 256, (2, 96), dtype=np.uint8)
    checksums = Checksums(lambda block: memoryview(memory[block]))
    expected = checksums.compute([0, 1])
    for bit in range(memory[1].size * 8):
        memory[1, bit // 8] ^= 1 << bit % 8
        assert await checksums.differing([0, 1], expected) == [1]
        memory[1, bit // 8] ^= 1 << bit % 8
    assert await checksums.differing([0, 1], expected) == []
    with pytest.raises(ValueError, match="1 checksums for 2 blocks"):
        await checksums.differing([0, 1], expected[:1])


def flip(d: PairedWorker, times: int) -> list[int]:
    """Flip one bit of a read after it landed, in so many reads. Counts down."""
    left = [times]

    def gate(read: Any) -> ReadState:
        if not read.is_fence and left[0]:
            left[0] -= 1
            _, target, _ = read.extents[0]  # its first byte; a read's second half comes after this
            ctypes.c_uint8.from_address(read.local.address + target).value ^= 1
        return ReadState.DONE

    d.transport.gate = gate
    return left


def failures(d: PairedWorker) -> float:
    """The counter, as Prometheus reads it."""
    (family,) = d.host.metrics.kv_checksum_failures.collect()
    return next(s.value for s in family.samples if s.name.endswith("_total"))


async def test_a_flipped_bit_is_found_and_the_block_pulled_anew() -> None:
    async with pair(decode=ON) as (p, d):
        left = flip(d, 1)
        ask = Ask(LONG, 8)
        assert await answer(d, p, ask) == ask.answer()
        assert left == [0] and failures(d) == 1
        assert p.runner.num_tokens == 40, "the peer still had it"
        assert d.runner.num_tokens == 1 + 7, "only the tail was computed here"
        await assert_at_rest(p, d)


async def test_without_checksums_the_same_flip_is_in_the_answer() -> None:
    """The test above can fail, and the fence does not detect it."""
    async with pair() as (p, d):
        left = flip(d, 1)
        ask = Ask(LONG, 8)
        assert await answer(d, p, ask) != ask.answer()
        assert left == [0] and failures(d) == 0
        assert d.host.plane.counters.num_stale_blocks == 0
        await assert_at_rest(p, d)


async def test_flips_every_time_end_with_computing_here() -> None:
    async with pair(decode=ON) as (p, d):
        flip(d, 1_000)
        ask = Ask(LONG, 8)
        assert await answer(d, p, ask) == ask.answer()
        assert failures(d) == 3, "three rounds"
        await assert_at_rest(p, d)


async def test_checksums_travel_only_where_they_are_asked_for() -> None:
    async with pair() as (p, _):
        stub = worker_pb2_grpc.PrefillServiceStub(p.host.channels.get(p.address))
        for with_checksums in (True, False):
            call = stub.Prefill(
                worker_pb2.PrefillRequest(
                    request_id="r",
                    caller_incarnation="me",
                    token_ids=LONG[:40],
                    checksums=with_checksums,
                )
            )
            seen = 0
            while seen < 10:
                response = await call.read()
                ready = response.ready
                if ready.block_ids:
                    expected = p.host.checksums.compute(ready.block_ids)
                    assert list(ready.checksums) == (expected if with_checksums else [])
                    seen += len(ready.block_ids)
            call.cancel()
        await assert_at_rest(p)


async def test_a_peer_without_checksums_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def unchecked(self: Any, ready: Any) -> Any:
        return ready

    monkeypatch.setattr("prefill.block_publisher.BlockPublisher.checksummed", unchecked)
    async with pair(decode=ON) as (p, d):
        with pytest.raises(Unavailable, match="0 checksums for 2 blocks"):
            await collect(decode_stub(d).Decode(Ask(LONG, 3).pb(p)), [])
        assert await answer(d, None, Ask(LONG, 3)) == Ask(LONG, 3).answer()
        await assert_at_rest(p, d)


async def test_a_call_cancelled_while_checksums_are_computed_holds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The lease is granted before the wait, so the blocks have an owner at any time."""
    computing = asyncio.Event()

    async def slow(self: Checksums, block_ids: Any) -> list[int]:
        computing.set()
        await asyncio.sleep(30)
        return []

    monkeypatch.setattr(Checksums, "of", slow)
    async with pair(decode=ON) as (p, d):
        call = decode_stub(d).Decode(Ask(LONG, 3).pb(p))
        reading = asyncio.create_task(collect(call, []))
        await asyncio.wait_for(computing.wait(), 5)
        assert p.host.kv.table.all
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await assert_at_rest(p, d, timeout_s=5)
