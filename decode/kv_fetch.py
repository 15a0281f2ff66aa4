"""Brings a request's blocks from its prefill peer, while the peer computes the next ones.

    Prefill stream --reader task--> chunks --one by one--> pull (data plane) --fence--> commit
                      |                                      |
                      leases renewed once read               lease released on the peer at once

The stream stays open until the last pull has ended: a peer that falls silent is noticed whatever is
being waited for, and its reads are cancelled.

A chunk's blocks are committed in order, so a request always has a clean prefix to go on from.
Blocks that the fence or their checksum refused are asked for again; a peer that is lost raises
`Unavailable(lost="prefill")`, and all that was committed by then is a prefix hit for the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc

from engine.base.errors import (
    DeadlineExceeded,
    DiptychError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from engine.base.types import Peer
from engine.pb.diptych.internal.v1 import worker_pb2, worker_pb2_grpc
from engine.rpc.liveness import next_message
from engine.rpc.status import from_rpc_error
from engine.scheduling.events import FetchEvent
from engine.step.engine_thread import EngineDied
from engine.step.operations import BlocksArrived, FetchEnded, Pin
from engine.telemetry.log import get_logger
from engine.telemetry.timeline import Event as Mark
from engine.telemetry.timeline import Timeline
from kvtransfer.kv_service import Renewer
from kvtransfer.pull import Pull
from kvtransfer.transport import RemotePool, TransferError
from worker.process import WorkerProcess

_log = get_logger(__name__)
_T = TypeVar("_T")
_LAST_WORDS_S = 0.5
_SETTLE_S = 0.2  # a read that was stopped usually ends in milliseconds
_MAX_ROUNDS = 3  # calls for the same blocks before the rest is computed here


@dataclass(slots=True)
class FetchJob:
    """One request's intake; lives until its last read is terminal."""

    request_id: str
    key: int
    peer: Peer
    cache_salt: str
    priority: int
    deadline_s: float  # monotonic
    timeline: Timeline
    pulls: list[Pull] = field(default_factory=list)
    prefill_s: float = 0.0  # until the wanted blocks were committed
    kv_transfer_s: float = 0.0  # spent reading, within that time
    num_cached_tokens: int | None = None  # as the peer counted them

    @property
    def late(self) -> bool:
        """Whether the request's own time is over."""
        return time.monotonic() >= self.deadline_s

    @property
    def reads(self) -> bool:
        """Whether a read may still write to the request's blocks."""
        return not all(pull.settled.done() for pull in self.pulls)


class KvFetcher:
    """All fetches of one decode worker."""

    def __init__(self, host: WorkerProcess) -> None:
        self._host = host

    async def run(self, fetch: FetchJob, wanted: FetchEvent) -> None:
        """Fetch the wanted blocks and tell the engine.

        Raises Unavailable when the peer is lost, DeadlineExceeded when the request's time is over.

        A peer that will not take the prompt (too long for its pool) is no loss: it is done here. A
        refusal in the midst of a read is one: nobody may compute into blocks that are being read.
        """
        num_committed = wanted.first_block
        begun_s = time.monotonic()
        try:
            for _ in range(_MAX_ROUNDS):
                num_committed = await self._round(fetch, wanted, num_committed)
                if num_committed == wanted.first_block + len(wanted.block_ids):
                    break
        except DiptychError as error:
            if isinstance(error, InvalidRequest | Overloaded) and not fetch.reads:
                self._host.metrics.prefill_refusals.inc()
                _log.warning("prefill refused, computing here", reason=error.message)
            elif fetch.late:  # its own time ran out: that says nothing of the peer
                raise DeadlineExceeded("the request's time ran out during its prefill") from error
            else:
                self._host.metrics.kv_transfer_failed(type(error).__name__)
                self._host.channels.keep_only(self._host.peers.addresses)
                sick = isinstance(error, Unavailable) and error.sick
                what = f"prefill worker lost: {error}"
                raise Unavailable(what, lost="prefill", sick=sick) from error
        fetch.prefill_s += time.monotonic() - begun_s
        cached = fetch.num_cached_tokens
        self._host.engine.post(FetchEnded(fetch.key, cached))

    async def cancel(self, fetch: FetchJob) -> None:
        """Stop a fetch's reads; returns when its request may give up its blocks.

        Where a read goes on (its peer hangs), its destination is pinned for it until it has ended.
        """
        for pull in fetch.pulls:
            pull.cancel()
        if fetch.pulls:
            ends = [asyncio.wrap_future(pull.settled) for pull in fetch.pulls]
            await asyncio.wait(ends, timeout=_SETTLE_S)
        for pull in fetch.pulls:
            if not pull.settled.done():
                await self._quarantine(pull)

    async def _quarantine(self, pull: Pull) -> None:
        """Let a read hold its destination, in place of the request that it was for."""
        try:
            await self._host.engine.call(Pin(pull.block_ids))
        except EngineDied:
            return  # nothing is held any more
        except TimeoutError:  # an engine that is slow: the request goes on holding them
            await asyncio.wrap_future(pull.settled)
            return
        self._host.in_background(self._end_quarantine(pull))

    async def _end_quarantine(self, pull: Pull) -> None:
        await asyncio.wrap_future(pull.settled)
        await self._host.blocks.unpin(pull.block_ids)

    async def _round(self, fetch: FetchJob, wanted: FetchEvent, num_committed: int) -> int:
        """One Prefill call from the first missing block on; returns how many are then committed."""
        channel = self._host.channels.get(fetch.peer.address)
        renewer = Renewer(worker_pb2_grpc.KvServiceStub(channel), self._host.incarnation)
        request = self._request(fetch, wanted, num_committed)
        chunks = _Chunks(channel, request, renewer, fetch.peer, self._left(fetch))
        try:
            pool = await chunks.guard(self._host.peers.connect(fetch.peer))
            while (ready := await chunks.next()) is not None:
                fetch.timeline.mark(Mark.ANNOUNCED)
                _check_meant(ready, wanted, num_committed)
                num_fresh = await self._pull(fetch, wanted, pool, ready, chunks)
                num_committed += num_fresh
                self._commit(fetch, num_committed)
                chunks.release(self._host.in_background(renewer.release(ready.lease)))
                if num_fresh < len(ready.block_ids):
                    return num_committed
        finally:
            self._host.in_background(chunks.close())
        if chunks.finished is not None and fetch.num_cached_tokens is None:
            fetch.num_cached_tokens = chunks.finished.num_cached_tokens
        if num_missing := wanted.first_block + len(wanted.block_ids) - num_committed:
            self._host.metrics.kv_transfer_failed("Incomplete")
            lost = {"request_id": fetch.request_id, "peer": fetch.peer.worker_id}
            _log.warning("blocks were not announced", num_blocks=num_missing, **lost)
        return num_committed

    async def _pull(
        self,
        fetch: FetchJob,
        wanted: FetchEvent,
        pool: RemotePool,
        ready: worker_pb2.BlocksReady,
        chunks: _Chunks,
    ) -> int:
        """Read one chunk; returns how many leading blocks passed the fence and their checksums."""
        start = ready.first_block - wanted.first_block
        local = wanted.block_ids[start : start + len(ready.block_ids)]
        pull = self._host.plane.pull(
            pool,
            list(ready.block_ids),
            local,
            list(ready.generations),
            min(self._host.transfer.pull_timeout_s, self._left(fetch)),
            fetch.request_id,
        )
        fetch.pulls.append(pull)
        try:
            result = await chunks.guard(asyncio.wrap_future(pull.done))
        except TransferError:
            if not fetch.late:
                self._host.in_background(self._host.peers.forget(pool))
            raise
        fetch.timeline.mark(Mark.PULLED)
        fetch.kv_transfer_s += result.seconds
        self._host.metrics.kv_transfer_blocks.inc(result.num_blocks)
        self._host.metrics.kv_transfer_bytes.inc(result.num_bytes)
        self._host.metrics.kv_transfer_seconds.observe(result.seconds)
        if result.stale:
            self._host.metrics.kv_stale_reads.inc(len(result.stale))
            _log.warning("stale blocks refused", num_blocks=len(result.stale))
        num_fresh = min(result.stale, default=len(local))
        if self._host.transfer.kv_checksums:
            return await self._num_intact(fetch, local[:num_fresh], ready)
        return num_fresh

    async def _num_intact(
        self, fetch: FetchJob, local: list[int], ready: worker_pb2.BlocksReady
    ) -> int:
        """How many leading blocks have the bytes that the peer announced."""
        try:
            bad = await self._host.checksums.differing(local, ready.checksums[: len(local)])
        except ValueError as error:
            raise Unavailable(f"the prefill worker sent {error}") from error
        if not bad:
            return len(local)
        self._host.metrics.kv_checksum_failures.inc(len(bad))
        peer = fetch.peer.worker_id
        _log.error("checksums differ, blocks refused", peer=peer, num_blocks=len(bad))
        return bad[0]

    def _commit(self, fetch: FetchJob, num_committed: int) -> None:
        self._host.engine.post(BlocksArrived(fetch.key, num_committed))
        fetch.timeline.mark(Mark.COMMITTED)

    def _request(
        self, fetch: FetchJob, wanted: FetchEvent, num_committed: int
    ) -> worker_pb2.PrefillRequest:
        return worker_pb2.PrefillRequest(
            request_id=fetch.request_id,
            incarnation=fetch.peer.incarnation,
            caller_incarnation=self._host.incarnation,
            token_ids=wanted.token_ids,
            num_held_blocks=num_committed,
            cache_salt=fetch.cache_salt,
            priority=fetch.priority,
            checksums=self._host.transfer.kv_checksums,
        )

    @staticmethod
    def _left(fetch: FetchJob) -> float:
        return max(0.001, fetch.deadline_s - time.monotonic())


def _check_meant(ready: worker_pb2.BlocksReady, wanted: FetchEvent, num_committed: int) -> None:
    """Raises Unavailable unless the blocks announced are the next ones of this very prompt."""
    if ready.first_block != num_committed:
        raise Unavailable(f"blocks announced from {ready.first_block}, expected {num_committed}")
    start = num_committed - wanted.first_block
    hashes = wanted.hashes[start : start + len(ready.block_ids)]
    counts = {len(ready.block_ids), len(ready.generations), len(hashes)}
    if len(counts) > 1 or list(ready.hashes) != hashes:
        raise Unavailable("blocks announced are not those of the prompt: their hashes differ")


class _Chunks:
    """A Prefill call, read ahead of the pulls so that every announced lease is renewed.

    It stays open until `close`, for its leases live no longer than it does. Whatever its user waits
    for, the break of the call ends the wait: see `guard`.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        request: worker_pb2.PrefillRequest,
        renewer: Renewer,
        peer: Peer,
        timeout_s: float,
    ) -> None:
        self._renewer = renewer
        self._peer = peer
        self._queue: asyncio.Queue[worker_pb2.BlocksReady | None] = asyncio.Queue()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._releasing: set[asyncio.Task[bool]] = set()
        self.finished: worker_pb2.PrefillFinished | None = None
        call = worker_pb2_grpc.PrefillServiceStub(channel).Prefill(request, timeout=timeout_s)
        self._reader = asyncio.create_task(self._read(call))

    async def next(self) -> worker_pb2.BlocksReady | None:
        """The next announcement, None after the last. Raises what broke the call."""
        if not self._queue.empty():
            return self._queue.get_nowait()
        return await self.guard(self._queue.get())

    async def guard(self, work: Awaitable[_T]) -> _T:
        """What `work` gives; if the call breaks first, its error is raised and `work` cancelled."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self._broken), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._broken.result()
            return await task
        finally:
            task.cancel()

    def release(self, releasing: asyncio.Task[bool]) -> None:
        """A lease is being released: the call is not ended before its peer has heard of it."""
        self._releasing.add(releasing)
        releasing.add_done_callback(self._releasing.discard)

    async def close(self) -> None:
        """End the call, and with it every lease that is left."""
        if self._releasing:
            await asyncio.wait(set(self._releasing), timeout=_LAST_WORDS_S)
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._broken.cancel()
        await self._renewer.close()

    async def _read(self, call: Any) -> None:
        """Put every announcement into the queue; say how the call broke, if it did."""
        error: DiptychError | None = Unavailable("prefill call cancelled")  # our channel was closed
        try:
            await self._read_all(call)
            error = None if self.finished else Unavailable("the prefill call ended too early")
        except DiptychError as failure:
            error = failure
        except grpc.RpcError as failure:
            error = from_rpc_error(failure) or Unavailable(f"prefill call failed: {failure}")
        except grpc.aio.UsageError as failure:
            error = Unavailable(f"prefill call failed: {failure}")
        finally:
            call.cancel()
            if error is not None and not self._broken.done():
                self._broken.set_exception(error)
                self._broken.exception()  # nobody need be waiting

    async def _read_all(self, call: Any) -> None:
        name = f"prefill worker {self._peer.worker_id}"
        # Stalls are reported to coordinators alone: a silent P costs another route, and no answer.
        while (response := await next_message(call, name)) is not None:
            if response.HasField("ready"):
                self._renewer.hold(response.ready.lease, response.ready.ttl_s)
                self._queue.put_nowait(response.ready)
            elif response.HasField("finished"):
                self.finished = response.finished
                self._queue.put_nowait(None)
