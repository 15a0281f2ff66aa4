"""Brings a request's blocks from its prefill peer, while the peer computes the next ones.

    Prefill stream --reader task--> chunks --one by one--> pull (data plane) --fence--> commit
                      |                                      |
                      leases renewed once read               lease released on the peer at once

A chunk's blocks are committed in order, so a request always has a clean prefix to go on from.
Blocks that the fence refused are asked for again; a peer that is lost raises
`Unavailable(lost="prefill")`, and all that was committed by then is a prefix hit for the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from engine.errors import (
    DeadlineExceeded,
    DiptychError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from engine.events import FetchEvent
from engine.pb.diptych.internal.v1 import worker_pb2, worker_pb2_grpc
from engine.rpc.status import from_rpc_error
from engine.telemetry.log import get_logger
from engine.telemetry.timeline import Event as Mark
from engine.telemetry.timeline import Timeline
from engine.types import Peer
from kvtransfer.base import RemotePool, TransferError
from kvtransfer.host import WorkerHost
from kvtransfer.reads import Pull
from kvtransfer.service import Renewer

_log = get_logger(__name__)
_LAST_WORDS_S = 0.1
_MAX_ROUNDS = 3  # calls for the same blocks before the rest is computed here


@dataclass(slots=True)
class Fetch:
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

    async def settled(self) -> None:
        """Stop all reads and wait until none can write to local memory any more."""
        for pull in self.pulls:
            pull.cancel()
        for pull in self.pulls:
            await asyncio.wrap_future(pull.settled)


class Intake:
    """All fetches of one decode worker."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host

    async def run(self, fetch: Fetch, wanted: FetchEvent) -> None:
        """Fetch the wanted blocks and tell the engine.

        Raises Unavailable when the peer is lost, DeadlineExceeded when the request's time is over.

        A peer that will not take the prompt (too long for its pool) is no loss: it is done here.
        """
        num_committed = wanted.first_block
        begun_s = time.monotonic()
        try:
            for _ in range(_MAX_ROUNDS):
                num_committed = await self._round(fetch, wanted, num_committed)
                if num_committed == wanted.first_block + len(wanted.block_ids):
                    break
        except (InvalidRequest, Overloaded) as error:
            _log.warning("prefill refused, computing here", reason=error.message)
        except DiptychError as error:
            if fetch.late:  # its own time ran out: that says nothing of the peer
                raise DeadlineExceeded("the request's time ran out during its prefill") from error
            self._host.metrics.kv_transfer_failed(type(error).__name__)
            self._host.channels.keep_only(self._host.peers.addresses)
            raise Unavailable(f"prefill worker lost: {error}", lost="prefill") from error
        fetch.prefill_s += time.monotonic() - begun_s
        cached = fetch.num_cached_tokens
        self._host.engine.post(lambda core: core.fetch_ended(fetch.key, cached))

    async def _round(self, fetch: Fetch, wanted: FetchEvent, num_committed: int) -> int:
        """One Prefill call from the first missing block on; returns how many are then committed."""
        pool = await self._host.peers.connect(fetch.peer)
        channel = self._host.channels.get(fetch.peer.address)
        renewer = Renewer(worker_pb2_grpc.KvServiceStub(channel), self._host.incarnation)
        chunks = _Chunks(channel, self._request(fetch, wanted, num_committed), renewer)
        try:
            async for ready in chunks.ready(self._left(fetch)):
                fetch.timeline.mark(Mark.ANNOUNCED)
                if ready.first_block != num_committed:
                    raise Unavailable(
                        f"blocks announced from {ready.first_block}, expected {num_committed}"
                    )
                num_fresh = await self._pull(fetch, wanted, pool, ready)
                num_committed += num_fresh
                self._commit(fetch, num_committed)
                self._host.in_background(renewer.release(ready.lease))
                if num_fresh < len(ready.block_ids):
                    return num_committed
        finally:
            self._host.in_background(chunks.close())
        if chunks.finished is not None and fetch.num_cached_tokens is None:
            fetch.num_cached_tokens = chunks.finished.num_cached_tokens
        return num_committed

    async def _pull(
        self,
        fetch: Fetch,
        wanted: FetchEvent,
        pool: RemotePool,
        ready: worker_pb2.BlocksReady,
    ) -> int:
        """Read one chunk; returns how many leading blocks passed the fence."""
        start = ready.first_block - wanted.first_block
        local = wanted.block_ids[start : start + len(ready.block_ids)]
        pull = self._host.plane.pull(
            pool,
            list(ready.block_ids),
            local,
            list(ready.generations),
            min(self._host.transfer.pull_timeout_s, self._left(fetch)),
        )
        fetch.pulls.append(pull)
        try:
            result = await asyncio.wrap_future(pull.done)
        except TransferError:
            if not fetch.late:
                self._host.in_background(self._host.peers.forget(pool))
            raise
        fetch.timeline.mark(Mark.PULLED)
        fetch.kv_transfer_s += result.seconds
        self._host.metrics.kv_transfer_blocks.inc(result.num_blocks)
        self._host.metrics.kv_transfer_bytes.inc(result.num_bytes)
        self._host.metrics.kv_transfer_seconds.observe(result.seconds)
        if not result.stale:
            return len(local)
        self._host.metrics.kv_stale_reads.inc(len(result.stale))
        _log.warning("stale blocks refused", num_blocks=len(result.stale))
        return min(result.stale)

    def _commit(self, fetch: Fetch, num_committed: int) -> None:
        self._host.engine.post(lambda core: core.blocks_arrived(fetch.key, num_committed))
        fetch.timeline.mark(Mark.COMMITTED)

    def _request(
        self, fetch: Fetch, wanted: FetchEvent, num_committed: int
    ) -> worker_pb2.PrefillRequest:
        return worker_pb2.PrefillRequest(
            request_id=fetch.request_id,
            incarnation=fetch.peer.incarnation,
            caller_incarnation=self._host.incarnation,
            token_ids=wanted.token_ids,
            num_held_blocks=num_committed,
            cache_salt=fetch.cache_salt,
            priority=fetch.priority,
        )

    @staticmethod
    def _left(fetch: Fetch) -> float:
        return max(0.001, fetch.deadline_s - time.monotonic())


class _Chunks:
    """A Prefill call, read ahead of the pulls so that every announced lease is renewed."""

    def __init__(
        self, channel: grpc.aio.Channel, request: worker_pb2.PrefillRequest, renewer: Renewer
    ) -> None:
        self._stub = worker_pb2_grpc.PrefillServiceStub(channel)
        self._request = request
        self._renewer = renewer
        self._queue: asyncio.Queue[worker_pb2.BlocksReady | DiptychError | None] = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None
        self.finished: worker_pb2.PrefillFinished | None = None

    async def close(self) -> None:
        """End the call and release every lease.

        The peer takes back what it could not say any more; what is on its way at this moment is
        still heard, or its leases would last until their TTL.
        """
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=_LAST_WORDS_S)
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        await self._renewer.close()

    async def ready(self, timeout_s: float) -> AsyncIterator[worker_pb2.BlocksReady]:
        """Announcements in order. Raises what ended the call early."""
        self._reader = asyncio.create_task(self._read(timeout_s))
        while (item := await self._queue.get()) is not None:
            if isinstance(item, DiptychError):
                raise item
            yield item

    async def _read(self, timeout_s: float) -> None:
        """Put every announcement into the queue, and last of all how the call ended."""
        end: DiptychError | None = Unavailable("prefill call cancelled")  # our channel was closed
        try:
            await self._read_all(timeout_s)
            end = None
        except grpc.RpcError as error:
            end = from_rpc_error(error) or Unavailable(f"prefill call failed: {error}")
        except grpc.aio.UsageError as error:
            end = Unavailable(f"prefill call failed: {error}")
        finally:
            self._queue.put_nowait(end)

    async def _read_all(self, timeout_s: float) -> None:
        call = self._stub.Prefill(self._request, timeout=timeout_s)
        try:
            async for response in call:
                if response.HasField("ready"):
                    self._renewer.hold(response.ready.lease, response.ready.ttl_s)
                    self._queue.put_nowait(response.ready)
                else:
                    self.finished = response.finished
        finally:
            call.cancel()
