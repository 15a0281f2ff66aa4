"""The client for asyncio. Owned by the event loop on which it is created."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self

import grpc

from coordinator.client.base import BaseClient, unreachable
from coordinator.client.events import OutputEvent
from coordinator.client.stream import Stream
from engine.base.errors import DeadlineExceeded, DiptychError
from engine.pb.diptych.v1 import admin_pb2, inference_pb2


class AsyncClient(BaseClient[AsyncIterator[OutputEvent]]):
    """A client for asyncio. Its errors are DiptychError, or grpc.RpcError for unknown statuses."""

    _open_channel = staticmethod(grpc.aio.insecure_channel)

    async def model(self, *, timeout_s: float = 10.0) -> inference_pb2.Model:
        """The served model."""
        methods = [stub.GetModel for stub in self._inference]
        request = inference_pb2.GetModelRequest()
        model: inference_pb2.Model = await self._ask(methods, request, timeout_s)
        return model

    async def workers(self, *, timeout_s: float = 10.0) -> Sequence[admin_pb2.Worker]:
        """The registered workers."""
        methods = [stub.ListWorkers for stub in self._admin]
        return list((await self._ask(methods, admin_pb2.ListWorkersRequest(), timeout_s)).workers)

    async def close(self) -> None:
        """Close the connections; calls on them are cancelled."""
        self._closed = True
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _events(self, stream: Stream) -> AsyncIterator[OutputEvent]:
        clock = self._clock
        while True:
            plan = stream.next(clock())
            if plan.wait_s > 0:
                await asyncio.sleep(plan.wait_s)
            call = self._call(stream, plan)
            with self._monitor.watch_from_loop(call, plan.silence_s) as silence:
                try:
                    async for response in call:
                        silence.reset()
                        if event := stream.take(response):
                            silence.is_waiting = False
                            yield event
                            silence.is_waiting = True
                        if stream.done:
                            return
                    stream.lost(None, clock())
                except grpc.aio.AioRpcError as error:
                    if self._closed:
                        raise stream.interrupted("the client was closed") from None
                    stream.lost(error, clock())
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if task and task.cancelling():
                        raise
                    if self._closed:
                        raise stream.interrupted("the client was closed") from None
                    if not silence.is_over:
                        raise
                    stream.silent(clock())
                finally:
                    call.cancel()

    async def _ask(self, methods: Sequence[Any], request: Any, timeout_s: float) -> Any:
        """The response of the first coordinator that can be reached."""
        failure: DiptychError | None = None
        for at, share_s in self._each_with_timeout(timeout_s):
            try:
                return await methods[at](request, timeout=share_s)
            except grpc.aio.AioRpcError as error:
                failure = unreachable(error)
        raise failure or DeadlineExceeded("the call's time ran out")
