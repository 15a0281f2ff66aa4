"""KvService: handshakes, and leases on blocks, given and taken by gRPC; and the client's renewals.

Owned by the asyncio loop. The engine thread owns the blocks, and pins and unpins them behind
`BlockHost`; this module records the lease of each pin. The reaper depends on neither the
scheduler's loop nor a peer. The server authenticates callers (`engine.rpc.auth`); a caller's
incarnation, by which it owns leases, is not verified further, as all members are trusted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, TypeVar

import grpc

from engine.pb.diptych.internal.v1 import worker_pb2 as pb
from engine.pb.diptych.internal.v1.worker_pb2_grpc import KvServiceServicer
from kvtransfer.handshake import pool_response
from kvtransfer.lease import LeaseTable, Refusal
from kvtransfer.transport import RemotePool

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_UNREACHABLE = (grpc.RpcError, grpc.aio.UsageError)  # the latter: the local channel is closed


class BlockHost(Protocol):
    """The owner of the blocks, the engine thread, as awaitables."""

    async def hold(self, hashes: Sequence[bytes]) -> tuple[list[int], list[int]]:
        """Pin the longest leading run of complete blocks: (block ids, generations)."""

    async def unpin(self, block_ids: Sequence[int]) -> None:
        """Take one pin from each id; an id that is listed twice loses two."""


@dataclass(eq=False)
class KvServicer(KvServiceServicer):
    """Serves one worker's pool; other services of the worker lease blocks by `table`.

    `pool` returns this worker's pool as peers reach it now. `on_refused` counts leases refused to
    callers, by reason, `on_expired` those that ran out.
    """

    pool: Callable[[], RemotePool]
    digest: str
    host: BlockHost
    table: LeaseTable
    on_refused: Callable[[str, int], None] = lambda reason, count: None
    on_expired: Callable[[], None] = lambda: None
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _ended: asyncio.Event = field(default_factory=asyncio.Event)  # set, and replaced, at each end

    async def Handshake(self, request: pb.HandshakeRequest, context: Any) -> pb.HandshakeResponse:
        """This worker's pool and agents, for a caller of the same digest."""
        if request.digest != self.digest:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"compatibility digest {self.digest}, the caller's {request.digest}",
            )
        await _require_caller(context, request.caller_incarnation)
        return pool_response(self.pool(), self.digest)

    async def Hold(self, request: pb.HoldRequest, context: Any) -> pb.HoldResponse:
        """Pin a prefix under a new lease."""
        await _require_caller(context, request.caller_incarnation)
        return await self._finish(self._hold(request))

    async def Renew(self, request: pb.RenewRequest, context: Any) -> pb.RenewResponse:
        """Give leases a whole TTL again."""
        await _require_caller(context, request.caller_incarnation)
        self._note_refusals("Renew", request, context)
        unknown = self.table.renew(request.caller_incarnation, request.leases)
        return pb.RenewResponse(unknown=unknown)

    async def Release(self, request: pb.ReleaseRequest, context: Any) -> pb.ReleaseResponse:
        """End leases."""
        await _require_caller(context, request.caller_incarnation)
        self._note_refusals("Release", request, context)
        await self.release(request.caller_incarnation, request.leases)
        return pb.ReleaseResponse()

    def _note_refusals(
        self, call: str, request: pb.RenewRequest | pb.ReleaseRequest, context: Any
    ) -> None:
        """Count and log leases that the caller may not use, never their ids."""
        refused = self.table.refusals(request.caller_incarnation, request.leases)
        for reason, count in refused.items():
            self.on_refused(reason.value, count)
        if refused:
            # Both sides may end a lease at once, which makes it unknown; foreign is never right.
            level = logging.WARNING if Refusal.FOREIGN in refused else logging.INFO
            words = ", ".join(f"{count} {reason.value}" for reason, count in refused.items())
            owner, peer = request.caller_incarnation[:64], context.peer()
            _log.log(level, "%s by %r (%s): leases refused: %s", call, owner, peer, words)

    async def release(self, owner: str, lease_ids: Sequence[bytes]) -> None:
        """End leases and unpin their blocks; unknown leases are no error."""
        block_ids = self.table.release(owner, lease_ids)
        if block_ids:
            self._note_end()
            await self._finish(self.host.unpin(block_ids))

    async def ended_within(self, lease_ids: Sequence[bytes], timeout_s: float) -> bool:
        """Wait until all of these leases have ended; False: some have not after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self.table.any_held(lease_ids):
                    await self._ended.wait()
        return not self.table.any_held(lease_ids)

    def _note_end(self) -> None:
        self._ended.set()
        self._ended = asyncio.Event()

    async def reap(self, interval_s: float | None = None) -> NoReturn:
        """Run for ever: unpin what has run out."""
        interval_s = interval_s or min(1.0, self.table.ttl_s / 4)
        while True:
            await asyncio.sleep(interval_s)
            for lease in self.table.expire():
                self._note_end()
                self.on_expired()
                _log.warning(
                    "lease of %s ran out: %d blocks of request %s",
                    lease.owner,
                    len(lease.block_ids),
                    lease.request_id or "unknown",
                )
                try:
                    await self.host.unpin(lease.block_ids)
                except Exception:
                    _log.exception("unpin of %d blocks failed", len(lease.block_ids))

    async def _hold(self, request: pb.HoldRequest) -> pb.HoldResponse:
        block_ids, generations = await self.host.hold(list(request.hashes))
        if not block_ids:
            return pb.HoldResponse()
        lease = self.table.grant(request.caller_incarnation, block_ids)
        return pb.HoldResponse(
            lease=lease.id, ttl_s=self.table.ttl_s, block_ids=block_ids, generations=generations
        )

    async def _finish(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Complete `work` even if the call is cancelled: every pin needs an owner."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)


class Renewer:
    """Renews leases at one peer every TTL/3, all in one call, until they are released.

    A lease that the peer does not know is dropped: the fence alone decides about blocks that were
    read under it. Every call has a deadline.
    """

    def __init__(self, stub: Any, owner: str) -> None:
        self._stub = stub
        self._owner = owner
        self._ttls: dict[bytes, float] = {}  # by lease, in seconds
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._renew_at = math.inf

    @property
    def leases(self) -> tuple[bytes, ...]:
        """The leases that are renewed."""
        return tuple(self._ttls)

    def hold(self, lease_id: bytes, ttl_s: float) -> None:
        """Renew this lease from now on."""
        self._ttls[lease_id] = ttl_s
        self._renew_at = min(self._renew_at, asyncio.get_running_loop().time() + ttl_s / 3)
        self._changed.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="kv-renew")

    async def release(self, *lease_ids: bytes, timeout_s: float = 5.0) -> bool:
        """End these leases, by default all; False: peer unreachable, so their TTL ends them."""
        ending = list(lease_ids or self._ttls)
        for lease_id in ending:
            self._ttls.pop(lease_id, None)
        if not ending:
            return True
        request = pb.ReleaseRequest(caller_incarnation=self._owner, leases=ending)
        try:
            await self._stub.Release(request, timeout=timeout_s)
        except _UNREACHABLE:
            return False
        return True

    async def close(self) -> None:
        """Release everything and stop."""
        await self.release()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._changed.clear()
            try:
                async with asyncio.timeout_at(self._renew_at if self._ttls else None):
                    await self._changed.wait()  # another lease, perhaps a shorter one
            except TimeoutError:
                if not self._ttls:  # all were released while it slept
                    self._renew_at = math.inf
                    continue
                interval_s = min(self._ttls.values()) / 3
                self._renew_at = loop.time() + interval_s
                await self._renew(timeout_s=interval_s)

    async def _renew(self, timeout_s: float) -> None:
        request = pb.RenewRequest(caller_incarnation=self._owner, leases=list(self._ttls))
        with contextlib.suppress(*_UNREACHABLE):  # the next call tries again
            response = await self._stub.Renew(request, timeout=timeout_s)
            for lease_id in response.unknown:
                self._ttls.pop(lease_id, None)


async def _require_caller(context: Any, incarnation: str) -> None:
    if not incarnation:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "caller_incarnation: unset")
