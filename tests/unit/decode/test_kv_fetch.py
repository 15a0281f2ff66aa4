"""Edge cases of a fetch, with the timing forced: what ends, what goes on, what is kept."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from decode.prefill_call import PrefillCall
from decode.service import _DecodeCall
from engine.base.errors import DeadlineExceeded, Overloaded, Unavailable
from engine.base.types import Peer
from engine.pb.diptych.internal.v1 import worker_pb2, worker_pb2_grpc
from engine.rpc.channel import open_channel
from engine.rpc.liveness import SILENCE_S
from engine.scheduling.events import AnnouncedEvent
from kvtransfer.kv_service import Renewer
from kvtransfer.transport import PeerLost, ReadState
from prefill.block_publisher import BlockPublisher
from tests.support.engine_probe import Probe
from tests.support.worker_pair import (
    Ask,
    answer,
    assert_at_rest,
    collect,
    decode_stub,
    pair,
    until,
)

pytestmark = pytest.mark.timeout(60)
LONG = tuple(range(41))  # ten whole blocks: with 8 prompt tokens a step, five announcements


async def _calls_end(close: bool) -> None:
    """Each end of a Prefill call's reader ends the wait for its blocks."""
    async with pair() as (p, _):
        channel = open_channel(p.address)
        request = worker_pb2.PrefillRequest(caller_incarnation="me", token_ids=LONG[:40])
        request.incarnation = p.host.incarnation
        p.runner.before_step = lambda: time.sleep(0.05)
        renewer = Renewer(worker_pb2_grpc.KvServiceStub(channel), "me")
        chunks = PrefillCall(channel, request, renewer, Peer("p", "i", p.address), 30)
        if close:
            await channel.close()
        with pytest.raises(Unavailable):
            async with asyncio.timeout(3):
                while await chunks.next():
                    await channel.close()
        await chunks.close()


async def test_a_channel_that_closes_ends_the_wait_for_blocks() -> None:
    await _calls_end(close=False)


async def test_a_closed_channel_ends_the_wait_for_blocks() -> None:
    await _calls_end(close=True)


async def test_blocks_count_before_their_lease_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A peer that hangs in Release must not delay what has passed the fence."""
    async with pair() as (p, d):
        hanging = asyncio.Event()

        async def release(self: Renewer, *leases: bytes, timeout_s: float = 5.0) -> bool:
            await hanging.wait()
            return True

        with monkeypatch.context() as patch:
            patch.setattr(Renewer, "release", release)
            ask = Ask(LONG, 3)
            tokens: list[int] = []
            await asyncio.wait_for(collect(decode_stub(d).Decode(ask.pb(p)), tokens), 5)
            assert tokens == ask.answer()
            hanging.set()
        await p.lose_leases(d.host.incarnation)
        await assert_at_rest(p, d)


async def test_a_worker_that_is_its_own_peer_computes_the_prompt() -> None:
    async with pair() as (_, d):
        ask = Ask(LONG, 3)
        tokens: list[int] = []
        await asyncio.wait_for(collect(decode_stub(d).Decode(ask.pb(d)), tokens), 5)
        assert tokens == ask.answer()
        assert d.host.plane.counters.num_pulls == 0
        await assert_at_rest(d)


@pytest.mark.parametrize(
    "change",
    [
        {"hashes": [b"x" * 16, b"y" * 16]},
        {"hashes": []},
        {"generations": [2]},
        {"block_ids": [0, 1, 2]},
        {"first_block": 1},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_blocks_of_another_prompt_are_refused(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that announces other blocks is a lost peer; its blocks are not even read."""
    publish = BlockPublisher.publish

    def astray(self: BlockPublisher, event: AnnouncedEvent) -> worker_pb2.BlocksReady:
        ready = publish(self, event)
        for name in change:
            ready.ClearField(name)  # type: ignore[arg-type]
        ready.MergeFrom(worker_pb2.BlocksReady(**change))
        return ready

    async with pair() as (p, d):
        ask = Ask(LONG, 3)
        with monkeypatch.context() as patch:
            patch.setattr(BlockPublisher, "publish", astray)
            with pytest.raises(Unavailable, match="blocks announced") as caught:
                await collect(decode_stub(d).Decode(ask.pb(p)), [])
        assert caught.value.lost == "prefill"
        assert d.host.plane.counters.num_blocks == 0
        assert await answer(d, p, ask) == ask.answer()
        await assert_at_rest(p, d)


async def test_a_request_out_of_time_does_not_cost_others_their_peer() -> None:
    async with pair() as (p, d):
        d.transport.gate = lambda read: ReadState.PENDING
        patient, hasty = Ask(LONG, 3), Ask(LONG[::-1], 3)
        tokens: list[int] = []
        going_on = asyncio.create_task(collect(decode_stub(d).Decode(patient.pb(p)), tokens))
        await until(lambda: d.host.plane.counters.num_in_flight == 1)
        with _time_left(0.2), pytest.raises(DeadlineExceeded):
            await collect(decode_stub(d).Decode(hasty.pb(p), timeout=10), [])
        d.transport.gate = lambda read: ReadState.DONE
        await going_on
        assert tokens == patient.answer()
        await assert_at_rest(p, d)


@contextmanager
def _time_left(left_s: float) -> Iterator[None]:
    """Decode calls have `left_s`, and gRPC does not cut them: the pull ends late."""
    init = _DecodeCall.__init__

    def hasty(self_: Any, service: Any, work: Any, request: Any, _: Any) -> None:
        init(self_, service, work, request, left_s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_DecodeCall, "__init__", hasty)
        yield


async def test_an_old_failure_does_not_drop_a_new_connection() -> None:
    """A failure on an earlier connection proves nothing about the next one."""
    async with pair() as (p, d):
        peer = Peer("p", p.host.incarnation, p.address)
        old = await d.host.peers.connect(peer)
        await d.host.peers.forget(old)
        new = await d.host.peers.connect(peer)
        assert new is not old
        await d.host.peers.forget(old)
        pull = d.host.plane.pull(new, [], [], [], 1.0)
        await asyncio.wrap_future(pull.done)


async def test_a_peer_that_was_never_connected_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair() as (p, d):
        refused: Future[None] = Future()
        refused.set_exception(PeerLost("still being disconnected"))
        monkeypatch.setattr(d.host.plane, "connect", lambda pool: refused)
        with pytest.raises(PeerLost):
            await d.host.peers.connect(Peer("p", p.host.incarnation, p.address))
        assert not d.host.peers.addresses


async def test_a_lost_peer_is_connected_anew() -> None:
    async with pair() as (p, d):
        lose = True

        def gate(read: Any) -> ReadState:
            nonlocal lose
            if lose:
                lose = False
                raise PeerLost("once")
            return ReadState.DONE

        d.transport.gate = gate
        ask = Ask(LONG, 3)
        with pytest.raises(Unavailable, match="once") as caught:
            await collect(decode_stub(d).Decode(ask.pb(p)), [])
        assert caught.value.lost == "prefill"
        assert await answer(d, p, ask) == ask.answer()
        assert d.host.plane.counters.num_blocks == 10
        await assert_at_rest(p, d)


async def test_cancelled_while_a_read_is_under_way_frees_what_it_cannot_write() -> None:
    async with pair() as (p, d):
        d.transport.gate = lambda read: ReadState.PENDING
        call = decode_stub(d).Decode(Ask(LONG, 3).pb(p))
        reading = asyncio.create_task(collect(call, []))
        await until(lambda: bool(d.transport.pending))
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await assert_at_rest(p)
        await until(lambda: d.pool().num_held == 2, 1.0)  # of 11: the chunk that is being read
        assert not d.host.engine.core._requests
        await asyncio.sleep(0.3)
        assert d.pool().num_held == 2, "the read may still write"
        d.transport.gate = lambda read: ReadState.DONE
        await assert_at_rest(d)


@pytest.mark.parametrize("in_read", [False, True], ids=["computing", "reading"])
async def test_a_silent_peer_is_lost_in_every_wait(
    in_read: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped process sends nothing and closes nothing; its last read may never end."""
    monkeypatch.setattr("prefill.service.BEAT_S", 1000.0)
    gate = threading.Event()
    async with pair() as (p, d):
        if in_read:
            d.transport.gate = lambda read: ReadState.PENDING
        else:
            p.runner.before_step = lambda: _wait_for(gate)
        begun, ask = time.monotonic(), Ask(LONG, 3)
        with pytest.raises(Unavailable, match="prefill worker p has sent nothing") as caught:
            await collect(decode_stub(d).Decode(ask.pb(p)), [])
        assert caught.value.lost == "prefill"
        assert time.monotonic() - begun < SILENCE_S + 1.5
        gate.set()
        # Its blocks are still held for a read that has not ended; no request waits for those.
        begun = time.monotonic()
        assert await answer(d, None, ask) == ask.answer()
        assert time.monotonic() - begun < 1.5, (
            "the budgets of these workers let a producer take 2 s"
        )
        assert (d.pool().num_held > 0) == in_read
        d.transport.gate = lambda read: ReadState.DONE
        await assert_at_rest(p, d)


async def test_a_refusal_during_a_read_does_not_let_it_compute() -> None:
    """gRPC itself may end a call as RESOURCE_EXHAUSTED; the read goes on, into blocks that stay."""
    async with pair() as (p, d):
        d.transport.gate = lambda read: ReadState.PENDING
        ask = Ask(LONG, 3)
        reading = asyncio.create_task(collect(decode_stub(d).Decode(ask.pb(p)), []))
        await until(lambda: bool(d.transport.pending))
        for stream in p.host.engine.streams:
            stream.push(Overloaded("enhance your calm", 1.0))
        with pytest.raises(Unavailable, match="enhance your calm") as caught:
            await asyncio.wait_for(reading, 5)
        assert caught.value.lost == "prefill"
        await until(lambda: not d.host.engine.core._requests)
        assert d.pool().num_held == 2, "the read may still write"
        d.transport.gate = lambda read: ReadState.DONE
        assert await answer(d, p, ask) == ask.answer()
        await assert_at_rest(p, d)


async def test_a_prompt_that_a_peer_will_not_take_is_computed_here_and_counted() -> None:
    gate = threading.Event()
    async with pair() as (p, d):
        p.runner.before_step = lambda: _wait_for(gate)
        ask = Ask(LONG, 3)
        answering = asyncio.create_task(answer(d, p, ask))
        await until(lambda: bool(p.host.engine.streams))
        for stream in p.host.engine.streams:
            stream.push(Overloaded("too long for this pool", 1.0))
        assert await asyncio.wait_for(answering, 5) == ask.answer()
        gate.set()
        (family,) = d.host.metrics.prefill_refusals.collect()
        assert [s.value for s in family.samples if s.name.endswith("_total")] == [1]
        await assert_at_rest(p, d)


async def test_reads_stale_every_time_end_with_computing_here() -> None:
    """Three rounds, then the decode worker computes the blocks."""
    async with pair() as (p, d):

        def gate(read: Any) -> ReadState:
            if not read.is_fence:
                p.pool().generations += 1  # as if all were taken anew meanwhile
            return ReadState.DONE

        d.transport.gate = gate
        ask = Ask(LONG, 3)
        assert await answer(d, p, ask) == ask.answer()
        assert d.host.plane.counters.num_stale_blocks >= 3
        assert d.host.plane.counters.num_pulls == 3
        assert d.runner.num_tokens == len(LONG) + 2
        await assert_at_rest(p, d)


async def test_blocks_that_are_never_announced_are_counted_and_computed_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with pair() as (p, d):
        read_next = PrefillCall.next

        async def lose_all(self: PrefillCall) -> None:
            while await read_next(self):
                pass

        monkeypatch.setattr(PrefillCall, "next", lose_all)
        ask = Ask(LONG, 3)
        assert await answer(d, p, ask) == ask.answer()
        (family,) = d.host.metrics._kv_transfer_failures.collect()
        totals = {s.labels["reason"]: s.value for s in family.samples if s.name.endswith("_total")}
        assert totals == {"Incomplete": 3}
        assert d.host.plane.counters.num_pulls == 0
        await assert_at_rest(p, d)


async def test_the_engine_s_death_ends_answers_and_fetches() -> None:
    async with pair() as (p, d):
        d.transport.gate = lambda read: ReadState.PENDING
        call = decode_stub(d).Decode(Ask(LONG, 3).pb(p))
        reading = asyncio.create_task(collect(call, []))
        await until(lambda: bool(d.transport.pending))

        def die(_: object) -> None:
            raise SystemError("boom")

        d.host.engine.post(Probe(die))
        with pytest.raises(Unavailable, match="engine"):
            await asyncio.wait_for(reading, 5)
        d.transport.gate = lambda read: ReadState.DONE
        await assert_at_rest(p)
        await until(lambda: not d.host.background)


async def test_a_call_ends_with_its_deadline_whatever_its_peer_does() -> None:
    async with pair() as (p, d):
        p.runner.before_step = lambda: time.sleep(1.0)
        begun = time.monotonic()
        with pytest.raises((DeadlineExceeded, Unavailable)):
            await collect(decode_stub(d).Decode(Ask(LONG, 3).pb(p), timeout=0.3), [])
        assert time.monotonic() - begun < 1.0
        p.runner.before_step = lambda: None
        await assert_at_rest(p, d)


def _wait_for(gate: threading.Event) -> None:
    assert gate.wait(30)
