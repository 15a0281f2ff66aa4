"""The client for asyncio. Owned by the event loop on which it is created."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Self

import grpc

from coordinator.client.attempts import RETRY_POLICY, RetryPolicy
from coordinator.client.coordinators import Coordinators, unreachable
from coordinator.client.events import OutputEvent
from coordinator.client.messages import chat_request, generate_request
from coordinator.client.stream import Call, Stream
from engine.base.errors import DeadlineExceeded, DiptychError
from engine.pb.diptych.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc


class AsyncClient:
    """A client for asyncio. Its errors are DiptychError, or grpc.RpcError for unknown statuses."""

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        retry_policy: RetryPolicy = RETRY_POLICY,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._coordinators = Coordinators(address, retry_policy, clock=clock, rng=rng)
        self._sleep = sleep
        options = self._coordinators.options
        self._channels = [
            grpc.aio.insecure_channel(address, options=options)
            for address in self._coordinators.addresses
        ]
        self._inference: list[Any] = [
            inference_pb2_grpc.InferenceServiceStub(c) for c in self._channels
        ]
        self._admin: list[Any] = [admin_pb2_grpc.AdminServiceStub(c) for c in self._channels]

    @property
    def num_resumed(self) -> int:
        """How many calls continued an output that another call had begun."""
        return self._coordinators.num_resumed

    def generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **options: Any
    ) -> AsyncIterator[OutputEvent]:
        """Stream a completion; closing the iterator cancels it.

        `options`: fields of the API by name (`temperature`, `stop`, `json_schema`, `n`, ...).
        """
        return self._stream_events(generate_request(prompt, **options), timeout_s)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> AsyncIterator[OutputEvent]:
        """Stream the next message of a conversation; closing the iterator cancels it.

        `options`: as for `generate`, and `tools`, `tool_choice`, `parallel_tool_calls`.
        """
        return self._stream_events(chat_request(messages, **options), timeout_s)

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
        self._coordinators.closed = True
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _stream_events(self, request: Any, timeout_s: float | None) -> AsyncIterator[OutputEvent]:
        return self._events(self._coordinators.stream(request, timeout_s))

    async def _events(self, stream: Stream) -> AsyncIterator[OutputEvent]:
        clock = self._coordinators.clock
        while True:
            plan = stream.next(clock())
            if plan.wait_s > 0:
                await self._sleep(plan.wait_s)
            call = self._call(stream, plan)
            with self._coordinators.monitor.watch_from_loop(call, plan.silence_s) as silence:
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
                    if self._coordinators.closed:
                        raise stream.interrupted("the client was closed") from None
                    stream.lost(error, clock())
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if task and task.cancelling():
                        raise
                    if self._coordinators.closed:
                        raise stream.interrupted("the client was closed") from None
                    if not silence.is_over:
                        raise
                    stream.silent(clock())
                finally:
                    call.cancel()

    def _call(self, stream: Stream, plan: Call) -> Any:
        if self._coordinators.closed:
            raise stream.interrupted("the client was closed")
        self._coordinators.called(plan.coordinator)
        method = getattr(self._inference[plan.coordinator], stream.method)
        return method(plan.request, timeout=stream.remaining_s(self._coordinators.clock()))

    async def _ask(self, methods: Sequence[Any], request: Any, timeout_s: float) -> Any:
        """The response of the first coordinator that can be reached."""
        failure: DiptychError | None = None
        for at, share_s in self._coordinators.each_with_timeout(timeout_s):
            try:
                return await methods[at](request, timeout=share_s)
            except grpc.aio.AioRpcError as error:
                failure = unreachable(error)
        raise failure or DeadlineExceeded("the call's time ran out")
