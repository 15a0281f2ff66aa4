"""Fetches a request's blocks from its prefill peer, while the peer computes the next ones.

    Prefill stream --PrefillCall--> chunks --one by one--> pull (data plane) --fence--> commit
                        |                                    |
                        leases renewed once read             lease released on the peer at once

The stream stays open until the last pull ended: a peer that falls silent is noticed in every wait,
and its reads are cancelled.

The blocks of a chunk are committed in order, so a request always has a complete prefix to continue
from. Blocks that the fence or their checksum refused are requested again. A lost peer raises
`Unavailable(lost="prefill")`; what was committed by then is a prefix hit for the next attempt.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from decode.prefill_call import PrefillCall
from engine.base.errors import (
    DeadlineExceeded,
    DiptychError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from engine.base.types import Peer
from engine.pb.diptych.internal.v1 import worker_pb2, worker_pb2_grpc
from engine.scheduling.events import FetchEvent
from engine.step.engine_thread import EngineDied
from engine.step.operations import BlocksArrived, FetchEnded, Pin
from engine.telemetry.log import get_logger
from engine.telemetry.timeline import Event as Mark
from engine.telemetry.timeline import Timeline
from kvtransfer.kv_service import Renewer
from kvtransfer.pull import Pull
from kvtransfer.service_host import ServiceHost
from kvtransfer.transport import RemotePool, TransferError

_log = get_logger(__name__)
_SETTLE_S = 0.2  # a read that was stopped usually ends in milliseconds
_MAX_ROUNDS = 3  # calls for the same blocks before the rest is computed here


@dataclass(slots=True)
class FetchJob:
    """The fetch of one request; lives until its last read is terminal."""

    request: worker_pb2.DecodeRequest
    key: int
    peer: Peer
    deadline_s: float  # monotonic
    timeline: Timeline
    pulls: list[Pull] = field(default_factory=list)
    prefill_s: float = 0.0  # until the wanted blocks were committed
    kv_transfer_s: float = 0.0  # spent reading, within that time
    num_cached_tokens: int | None = None  # as the peer counted them

    @property
    def late(self) -> bool:
        """Whether the request's own deadline passed."""
        return time.monotonic() >= self.deadline_s

    @property
    def left_s(self) -> float:
        """Seconds until the deadline, at least a millisecond."""
        return max(0.001, self.deadline_s - time.monotonic())

    @property
    def reads(self) -> bool:
        """Whether a read may still write to the request's blocks."""
        return not all(pull.settled.done() for pull in self.pulls)


class KvFetcher:
    """All fetches of one worker."""

    def __init__(self, host: ServiceHost) -> None:
        self._host = host

    async def run(self, fetch: FetchJob, wanted: FetchEvent) -> None:
        """Fetch the wanted blocks and report the end to the engine.

        Raises Unavailable when the peer is lost, DeadlineExceeded after the request's deadline.

        A peer that refuses the prompt (too long for its pool) is not lost: the prompt is computed
        here. A refusal during a read is a loss: nothing may compute into blocks that a read may
        still write.
        """
        num_committed = wanted.first_block
        begun_s = time.monotonic()
        try:
            for _ in range(_MAX_ROUNDS):
                num_committed = await self._round(fetch, wanted, num_committed)
                if num_committed == wanted.end:
                    break
        except DiptychError as error:
            if isinstance(error, InvalidRequest | Overloaded) and not fetch.reads:
                self._host.metrics.prefill_refusals.inc()
                _log.warning("prefill refused, computing here", reason=error.message)
            elif fetch.late:  # proves nothing against the peer
                raise DeadlineExceeded("the request's time ran out during its prefill") from error
            else:
                self._host.metrics.kv_transfer_failed(type(error).__name__)
                self._host.channels.keep_only(self._host.peers.addresses)
                sick = isinstance(error, Unavailable) and error.sick
                what = f"prefill worker lost: {error}"
                raise Unavailable(what, lost="prefill", sick=sick) from error
        fetch.prefill_s += time.monotonic() - begun_s
        self._host.engine.post(FetchEnded(fetch.key, fetch.num_cached_tokens))

    async def cancel(self, fetch: FetchJob) -> None:
        """Stop a fetch's reads; returns when its request may give up its blocks.

        Where a read goes on (its peer hangs), its destination is pinned until it ended.
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
        """Pin the destination of a read for the read itself, in place of its request."""
        try:
            await self._host.engine.call(Pin(pull.block_ids))
        except EngineDied:
            return  # nothing is held any more
        except TimeoutError:  # a slow engine: the request keeps its blocks
            await asyncio.wrap_future(pull.settled)
            return
        self._host.in_background(self._end_quarantine(pull))

    async def _end_quarantine(self, pull: Pull) -> None:
        await asyncio.wrap_future(pull.settled)
        await self._host.blocks.unpin(pull.block_ids)

    async def _round(self, fetch: FetchJob, wanted: FetchEvent, num_committed: int) -> int:
        """Make one Prefill call from the first missing block on; returns the blocks committed."""
        channel = self._host.channels.get(fetch.peer.address)
        renewer = Renewer(worker_pb2_grpc.KvServiceStub(channel), self._host.incarnation)
        request = self._request(fetch, wanted, num_committed)
        call = PrefillCall(channel, request, renewer, fetch.peer, fetch.left_s)
        try:
            pool = await call.guard(self._host.peers.connect(fetch.peer))
            while (ready := await call.next()) is not None:
                fetch.timeline.mark(Mark.ANNOUNCED)
                _check_expected(ready, wanted, num_committed)
                num_fresh = await self._pull(fetch, wanted, pool, ready, call)
                num_committed += wanted.entries(num_committed, num_fresh)
                self._host.engine.post(BlocksArrived(fetch.key, num_committed))
                fetch.timeline.mark(Mark.COMMITTED)
                call.release(self._host.in_background(renewer.release(ready.lease)))
                if num_fresh < len(ready.block_ids):
                    return num_committed
        finally:
            self._host.in_background(call.close())
        if call.finished is not None and fetch.num_cached_tokens is None:
            fetch.num_cached_tokens = call.finished.num_cached_tokens
        if num_missing := wanted.end - num_committed:
            self._host.metrics.kv_transfer_failed("Incomplete")
            _log.warning(
                "blocks were not announced",
                num_blocks=num_missing,
                request_id=fetch.request.request_id,
                peer=fetch.peer.worker_id,
            )
        return num_committed

    async def _pull(
        self,
        fetch: FetchJob,
        wanted: FetchEvent,
        pool: RemotePool,
        ready: worker_pb2.BlocksReady,
        call: PrefillCall,
    ) -> int:
        """Read one chunk; returns how many leading blocks passed the fence and their checksums."""
        start = wanted.offset(ready.first_block)
        local = wanted.block_ids[start : start + len(ready.block_ids)]
        pull = self._host.plane.pull(
            pool,
            list(ready.block_ids),
            local,
            list(ready.generations),
            min(self._host.transfer.pull_timeout_s, fetch.left_s),
            fetch.request.request_id,
        )
        fetch.pulls.append(pull)
        try:
            result = await call.guard(asyncio.wrap_future(pull.done))
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

    def _request(
        self, fetch: FetchJob, wanted: FetchEvent, num_committed: int
    ) -> worker_pb2.PrefillRequest:
        return worker_pb2.PrefillRequest(
            request_id=fetch.request.request_id,
            incarnation=fetch.peer.incarnation,
            caller_incarnation=self._host.incarnation,
            token_ids=wanted.token_ids,
            num_held_blocks=num_committed,
            cache_salt=fetch.request.cache_salt,
            priority=fetch.request.priority,
            checksums=self._host.transfer.kv_checksums,
        )


def _check_expected(ready: worker_pb2.BlocksReady, wanted: FetchEvent, num_committed: int) -> None:
    """Raise Unavailable unless the announced blocks are the next ones of this prompt."""
    if ready.first_block != num_committed:
        raise Unavailable(f"blocks announced from {ready.first_block}, expected {num_committed}")
    start = wanted.offset(num_committed)
    hashes = wanted.hashes[start : start + len(ready.block_ids)]
    counts = {len(ready.block_ids), len(ready.generations), len(hashes)}
    if len(counts) > 1 or list(ready.hashes) != hashes:
        raise Unavailable("blocks announced are not those of the prompt: their hashes differ")
    end = num_committed + wanted.entries(num_committed, len(hashes))
    if wanted.offset(end) != start + len(hashes):
        raise Unavailable("blocks announced end within an entry of the block table")
