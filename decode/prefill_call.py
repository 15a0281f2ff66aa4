"""One Prefill call to a peer, read ahead of the pulls so that every announced lease is renewed.

    reader task: BlocksReady -> lease renewed, announcement queued
                 PrefillFinished -> end of the queue
                 error, silence -> every wait of `guard` ends with it

The call stays open until `close`, because its leases end with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc

from engine.base.errors import DiptychError, Unavailable
from engine.base.types import Peer
from engine.pb.diptych.internal.v1 import worker_pb2, worker_pb2_grpc
from engine.rpc.liveness import next_message
from engine.rpc.status import from_rpc_error
from kvtransfer.kv_service import Renewer

_T = TypeVar("_T")
_RELEASE_S = 0.5  # for releases under way when the call ends


class PrefillCall:
    """The announcements of one Prefill call, in order."""

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
        """Return the next announcement, None after the last. Raises what broke the call."""
        if not self._queue.empty():
            return self._queue.get_nowait()
        return await self.guard(self._queue.get())

    async def guard(self, work: Awaitable[_T]) -> _T:
        """Await `work`; if the call breaks first, raise its error and cancel `work`."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait((task, self._broken), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                self._broken.result()
            return await task
        finally:
            task.cancel()

    def release(self, releasing: asyncio.Task[bool]) -> None:
        """Keep the call open until this release of a lease reached the peer."""
        self._releasing.add(releasing)
        releasing.add_done_callback(self._releasing.discard)

    async def close(self) -> None:
        """End the call, and with it every lease that is left."""
        if self._releasing:
            await asyncio.wait(set(self._releasing), timeout=_RELEASE_S)
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._broken.cancel()
        await self._renewer.close()

    async def _read(self, call: Any) -> None:
        """Queue every announcement; set `_broken` where the call ends with an error."""
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
                self._broken.exception()  # marks it as retrieved: no task may be waiting

    async def _read_all(self, call: Any) -> None:
        name = f"prefill worker {self._peer.worker_id}"
        # Stalls are reported to coordinators only: a silent peer costs another route, no output.
        while (response := await next_message(call, name)) is not None:
            if response.HasField("ready"):
                self._renewer.hold(response.ready.lease, response.ready.ttl_s)
                self._queue.put_nowait(response.ready)
            elif response.HasField("finished"):
                self.finished = response.finished
                self._queue.put_nowait(None)
