"""Reads that hang for real: over TCP a read needs its target's progress thread, and SIGSTOP stops
that. What such reads keep, how a decode worker gets it back, and that nothing lands afterwards.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from engine.base.types import Peer
from engine.pb.diptych.internal.v1.worker_pb2_grpc import KvServiceStub
from kvtransfer.peers import PeerTable
from kvtransfer.pull import Pull
from kvtransfer.quarantine import Quarantine
from kvtransfer.transport import PeerLost, PullTimeout, RemotePool
from tests.support import kv_worker
from tests.support.greedy import GREEDY
from tests.support.stack import EXACT, Stack, metrics_of, until
from tests.support.timeouts import Timeouts

NUM_BLOCKS, BLOCK_BYTES = 64, 1 << 20
BLOCKS = list(range(NUM_BLOCKS))
TCP = {"UCX_TLS": "tcp"}
OLD, WANTED, REUSED, LATER = 1, 2, 3, 4  # seeds of what is written into the local blocks
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")


@pytest.fixture
def make_pool() -> Iterator[Callable[[Quarantine], kv_worker.Pool]]:
    pools: list[kv_worker.Pool] = []

    def make(quarantine: Quarantine) -> kv_worker.Pool:
        pools.append(kv_worker.Pool(NUM_BLOCKS, BLOCK_BYTES, quarantine=quarantine))
        return pools[-1]

    yield make
    for pool in pools:
        pool.plane.stop()


def content(seed: int) -> np.ndarray:
    return kv_worker.pattern(seed, (NUM_BLOCKS, BLOCK_BYTES))


def stop_in_mid_read(local: kv_worker.Pool, pool: RemotePool, peer: kv_worker.Worker) -> Pull:
    """A pull whose peer is stopped when a part of it has landed and another has not."""
    whole = content(WANTED).view(np.uint64)  # before: from the timeout on, time is short
    for _ in range(20):
        told = peer.ask("fill", WANTED)
        local.blocks[:] = content(OLD)
        pull = local.plane.pull(pool, BLOCKS, BLOCKS, told, 1.0, "hangs")
        begun = time.monotonic()
        while (local.blocks[0, :64] == content_head).all() and time.monotonic() < begun + 5:
            pass
        peer.pause()
        with suppress(PullTimeout):
            pull.done.result(5)
            peer.resume()
            continue  # it was quicker
        landed = (local.blocks.view(np.uint64) == whole).all(axis=1)
        print("blocks that had landed:", int(landed.sum()))
        if not landed.all():
            return pull
        peer.resume()
        pull.settled.result(20)
    raise AssertionError("no read was under way when its peer was stopped")


content_head = kv_worker.pattern(OLD, (NUM_BLOCKS, BLOCK_BYTES))[0, :64]


def ready_peers(
    local: kv_worker.Pool, peers: list[kv_worker.Worker]
) -> tuple[RemotePool, RemotePool]:
    """The pools of two peers, connected and read from once."""
    pools = []
    for peer in peers:
        pool, told = peer.ask("pool")
        local.plane.connect(pool).result(10)
        local.plane.pull(pool, BLOCKS, BLOCKS, told, 30).done.result(30)
        pools.append(pool)
    return pools[0], pools[1]


@pytest.mark.parametrize("lanes", ["tcp", "posix,sysv,self,tcp"])
def test_after_a_restart_nothing_of_the_read_lands(
    make_pool: Any, lanes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", lanes)
    others = _native_threads()
    local = make_pool(Quarantine(max_s=2.0, share=1.0))
    first = _native_threads() - others
    assert first, "an agent has a progress thread"
    with kv_worker.workers(2, NUM_BLOCKS, BLOCK_BYTES, {"UCX_TLS": lanes}) as peers:
        stopped, other = ready_peers(local, peers)
        pull = stop_in_mid_read(local, stopped, peers[0])
        until(lambda: local.plane.counters.num_quarantined_blocks == NUM_BLOCKS, 5, "quarantine")
        assert local.plane.counters.num_restarts == 0 and not pull.settled.done()
        pull.settled.result(20)
        assert local.plane.counters.num_restarts == 1
        until(lambda: local.plane.counters.num_quarantined_blocks == 0, 5, "nothing is kept")
        assert local.plane.agent == f"{local.incarnation}.2"
        now = _native_threads() - others
        assert len(now) == len(first) and now != first, "the old agent's progress thread has ended"

        # The blocks are used again while the peer still sleeps, and by reads from another one.
        reused = content(REUSED).copy()
        local.blocks[:] = reused
        told = peers[1].ask("fill", LATER)
        half = BLOCKS[: NUM_BLOCKS // 2]
        pull = local.plane.pull(other, half, half, [told[i] for i in half], 30)
        assert pull.done.result(30).stale == ()
        reused[half] = content(LATER)[half]
        assert (local.blocks == reused).all()

        # It goes on, and answers whatever it was asked; our own reads drive NIXL meanwhile.
        peers[0].resume()
        quiet_until = time.monotonic() + 4
        while time.monotonic() < quiet_until:
            pull = local.plane.pull(other, half, half, [told[i] for i in half], 30)
            assert pull.done.result(30).stale == ()
            assert (local.blocks == reused).all()
            time.sleep(0.05)

        # UCX ends a process that finds its reader gone before it has answered; or it goes on well.
        assert peers[0].process.exitcode in (None, -signal.SIGABRT)


@pytest.mark.usefixtures("over_tcp")
def test_without_a_restart_the_same_read_lands_when_its_peer_goes_on(make_pool: Any) -> None:
    """So the test above can fail: this is what quarantine keeps blocks from."""
    local = make_pool(Quarantine(max_s=600, share=1.0))
    local.plane._loop.quarantine = Quarantine(
        max_s=600, share=2.0
    )  # no bound that could be reached
    with kv_worker.workers(2, NUM_BLOCKS, BLOCK_BYTES, TCP) as peers:
        stopped, _ = ready_peers(local, peers)
        pull = stop_in_mid_read(local, stopped, peers[0])
        local.blocks[:] = content(REUSED)  # as if they had been given back
        time.sleep(0.5)
        peers[0].resume()
        pull.settled.result(20)
        assert (local.blocks != content(REUSED)).any()


@pytest.mark.usefixtures("over_tcp")
def test_a_peer_that_began_anew_is_found_by_a_handshake(make_pool: Any) -> None:
    """Its old agent is gone: reads fail as its loss, and the next handshake names the new one."""
    import asyncio

    async def run() -> None:
        local = make_pool(Quarantine())
        with kv_worker.workers(1, NUM_BLOCKS, BLOCK_BYTES, TCP) as (owner,):
            address = owner.ask("listen", "d")
            async with grpc.aio.insecure_channel(address) as channel:
                table = PeerTable(
                    local.plane, digest="d", stub_factory=lambda _: KvServiceStub(channel)
                )
                before, told = owner.ask("pool")
                peer = Peer("w", before.incarnation, address)
                pool = await table.connect(peer)
                local.plane.pull(pool, BLOCKS, BLOCKS, told, 30).done.result(30)
                assert owner.ask("restart") == f"{before.incarnation}.2"
                with pytest.raises((PeerLost, PullTimeout)):
                    local.plane.pull(pool, BLOCKS, BLOCKS, told, 10).done.result(15)
                await table.forget(pool)
                again = await table.connect(peer)
                assert again.incarnation == pool.incarnation
                assert again.agents[0].name == f"{before.incarnation}.2" != pool.agents[0].name
                told = owner.ask("fill", WANTED)
                pull = local.plane.pull(again, BLOCKS, BLOCKS, told, 30)
                assert pull.done.result(30).stale == ()
                assert (local.blocks == content(WANTED)).all()

    asyncio.run(run())


def _native_threads() -> set[int]:
    """The threads of this process that libraries started: agents' progress threads among them."""
    python = {thread.native_id for thread in threading.enumerate()}
    return {int(name) for name in os.listdir("/proc/self/task")} - python


# -- the whole stack -------------------------------------------------------------------------------

CASES = [case for case in GREEDY if len(case["prompt"]) >= 700]
NUM_TOKENS = 8
# Small buffers: reads take longer, so that it is easier to stop their peer in the middle of one.
SLOW_TCP = {"UCX_TLS": "tcp", "UCX_TCP_SNDBUF": "16k", "UCX_TCP_RCVBUF": "16k"}


def test_a_stopped_prefill_worker_costs_a_restart_of_the_data_plane_and_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SLOW_TCP.items():
        monkeypatch.setenv(name, value)
    flags = (*Timeouts(quarantine_s=4).stack_flags, "--quarantine-share", "1")
    with Stack(tmp_path, *EXACT, *flags, prefill=2) as stack:
        (d,) = stack.workers("decode")
        decode_pid = stack.pid_of(d.worker_id)
        for attempt in range(8):
            case = CASES[attempt % len(CASES)]
            prompt = [attempt + 1, *case["prompt"]]  # new blocks each time
            stopped, answered = _stop_in_a_pull(stack, d.http_address, prompt)
            try:
                until(lambda: bool(_quarantined(d.http_address)), 6, "blocks are quarantined")
                break
            except AssertionError:  # the read had just ended
                os.kill(stopped, signal.SIGCONT)
                answered()
                until(stack.ready, 20, "the prefill worker is back")
                stack.assert_at_rest()
        else:
            raise AssertionError("no read was under way when its peer was stopped")
        until(
            lambda: bool(stack.workers("decode")[0].quarantined_blocks),
            2,
            "the coordinator knows",
        )

        def restarted() -> bool:
            return metrics_of(d.http_address)["diptych_kv_data_plane_restarts_total"] == 1

        until(restarted, 20, "the data plane restarts")
        answered()
        until(lambda: _quarantined(d.http_address) == 0, 5, "nothing is quarantined")
        until(lambda: stack.workers("decode")[0].held_blocks == 0, 10, "nothing is held")
        assert stack.pid_of(d.worker_id) == decode_pid, "the process is the same"

        # The other prefill worker's blocks come over the new agent.
        moved = metrics_of(d.http_address)["diptych_kv_transfer_blocks_total"]
        case = CASES[-1]
        assert stack.generate(case["prompt"], max_tokens=NUM_TOKENS)[0] == _right(case)
        assert metrics_of(d.http_address)["diptych_kv_transfer_blocks_total"] > moved

        # The stopped one wakes up, and what it still sends reaches no process.
        os.kill(stopped, signal.SIGCONT)
        time.sleep(1.0)
        until(stack.ready, 60, "the prefill worker is back, or another in its place")
        for case in CASES:
            assert stack.generate(case["prompt"], max_tokens=NUM_TOKENS)[0] == _right(case)
        stack.assert_at_rest()
        assert stack.pid_of(d.worker_id) == decode_pid
        assert restarted()


def _right(case: dict[str, Any]) -> list[int]:
    return list(case["tokens"][:NUM_TOKENS])


def _quarantined(http_address: str) -> int:
    return int(metrics_of(http_address)["diptych_kv_quarantined_blocks"])


def _stop_in_a_pull(
    stack: Stack, http_address: str, prompt: list[int]
) -> tuple[int, Callable[[], None]]:
    """Ask for an answer and stop the prefill worker from which a read is seen to be under way.

    Returns its process, and what waits for the answer, which comes all the same.
    """
    pids = {w.incarnation: stack.pid_of(w.worker_id) for w in stack.workers("prefill")}
    answers: list[list[int]] = []
    asking = threading.Thread(
        target=lambda: answers.append(stack.generate(prompt, max_tokens=NUM_TOKENS)[0])
    )
    asking.start()

    def answered() -> None:
        asking.join(120)
        assert [len(tokens) for tokens in answers] == [NUM_TOKENS]

    with httpx.Client() as client:
        while asking.is_alive():
            for hold in client.get(f"http://{http_address}/debug/holds").json()["holds"]:
                if hold["kind"] == "pull":
                    os.kill(pids[hold["peer"]], signal.SIGSTOP)
                    return pids[hold["peer"]], answered
    raise AssertionError("no pull was seen")
