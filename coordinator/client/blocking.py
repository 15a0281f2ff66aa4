"""The blocking client, usable from any thread: it makes the calls and waits of `Stream`.

A call is open from the first event until the iterator ends, is closed or is garbage-collected.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import grpc

from coordinator.client.attempts import RETRY_POLICY, RetryPolicy
from coordinator.client.coordinators import Coordinators, unreachable
from coordinator.client.events import OutputEvent
from coordinator.client.messages import chat_request, generate_request
from coordinator.client.stream import Call, Stream
from engine.base.errors import DeadlineExceeded, DiptychError
from engine.pb.diptych.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from engine.rpc.auth import ClusterToken
from engine.rpc.local_token import local_coordinator


class Client:
    """A blocking client. Its errors are DiptychError, or grpc.RpcError for unknown statuses."""

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        retry_policy: RetryPolicy = RETRY_POLICY,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._coordinators = Coordinators(address, retry_policy, clock=clock, rng=rng)
        self._sleep = sleep
        options = self._coordinators.options
        self._channels = [
            grpc.insecure_channel(address, options=options)
            for address in self._coordinators.addresses
        ]
        self._inference = [inference_pb2_grpc.InferenceServiceStub(c) for c in self._channels]
        self._admin = [admin_pb2_grpc.AdminServiceStub(c) for c in self._channels]

    @property
    def num_resumed(self) -> int:
        """How many calls continued an output that another call had begun."""
        return self._coordinators.num_resumed

    def generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **options: Any
    ) -> Iterator[OutputEvent]:
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
    ) -> Iterator[OutputEvent]:
        """Stream the next message of a conversation; closing the iterator cancels it.

        `options`: as for `generate`, and `tools`, `tool_choice`, `parallel_tool_calls`.
        """
        return self._stream_events(chat_request(messages, **options), timeout_s)

    def model(self, *, timeout_s: float = 10.0) -> inference_pb2.Model:
        """The served model."""
        methods = [stub.GetModel for stub in self._inference]
        model: inference_pb2.Model = self._ask(methods, inference_pb2.GetModelRequest(), timeout_s)
        return model

    def workers(self, *, timeout_s: float = 10.0) -> Sequence[admin_pb2.Worker]:
        """The registered workers."""
        methods = [stub.ListWorkers for stub in self._admin]
        return list(self._ask(methods, admin_pb2.ListWorkersRequest(), timeout_s).workers)

    def drain(
        self,
        worker_id: str,
        deadline_s: float | None = None,
        *,
        token: ClusterToken | None = None,
        timeout_s: float = 600.0,
    ) -> None:
        """Have a worker finish or hand over its requests and end; returns when it has ended.

        `deadline_s`: time for the requests to finish; None: the worker's --drain-s.
        `token`: the cluster's token; None: that of this user's coordinator on this machine.
        """
        request = admin_pb2.DrainWorkerRequest(worker_id=worker_id, deadline_s=deadline_s)
        methods = []
        with ExitStack() as opened:
            for stub, address in zip(self._admin, self._coordinators.addresses, strict=True):
                own = token
                if token is None and (found := local_coordinator(address)):
                    # Call the examined address: the name may have others.
                    own, options = found[1], self._coordinators.options
                    channel = grpc.insecure_channel(found[0], options=options)
                    stub = admin_pb2_grpc.AdminServiceStub(opened.enter_context(channel))
                metadata = own.metadata if own else ()
                methods.append(partial(stub.DrainWorker, metadata=metadata))
            self._ask(methods, request, timeout_s)

    def close(self) -> None:
        """Close the connections; calls on them are cancelled."""
        self._coordinators.closed = True
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream_events(self, request: Any, timeout_s: float | None) -> Iterator[OutputEvent]:
        return self._events(self._coordinators.stream(request, timeout_s))

    def _events(self, stream: Stream) -> Iterator[OutputEvent]:
        clock = self._coordinators.clock
        while True:
            plan = stream.next(clock())
            if plan.wait_s > 0:
                self._sleep(plan.wait_s)
            call = self._call(stream, plan)
            with self._coordinators.monitor.watch_from_thread(call, plan.silence_s) as silence:
                try:
                    for response in call:
                        silence.reset()
                        if event := stream.take(response):
                            silence.is_waiting = False
                            yield event
                            silence.is_waiting = True
                        if stream.done:
                            return
                    stream.lost(None, clock())
                except grpc.RpcError as error:
                    if self._coordinators.closed:
                        raise stream.interrupted("the client was closed") from None
                    if silence.is_over:
                        stream.silent(clock())
                    else:
                        stream.lost(error, clock())
                finally:
                    call.cancel()

    def _call(self, stream: Stream, plan: Call) -> Any:
        if self._coordinators.closed:
            raise stream.interrupted("the client was closed")
        self._coordinators.called(plan.coordinator)
        method = getattr(self._inference[plan.coordinator], stream.method)
        return method(plan.request, timeout=stream.remaining_s(self._coordinators.clock()))

    def _ask(self, methods: Sequence[Any], request: Any, timeout_s: float) -> Any:
        """The response of the first coordinator that can be reached."""
        failure: DiptychError | None = None
        for at, share_s in self._coordinators.each_with_timeout(timeout_s):
            try:
                return methods[at](request, timeout=share_s)
            except grpc.RpcError as error:
                failure = unreachable(error)
        raise failure or DeadlineExceeded("the call's time ran out")
