"""Blocking calls, from any thread: what the stream of an answer asks for is called and waited for.

A call is open from its first event until the iterator ends, is closed or is forgotten.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import grpc

from coordinator.client.attempts import RETRY_POLICY, RetryPolicy
from coordinator.client.coordinators import Coordinators, unreachable
from coordinator.client.events import OutputEvent
from coordinator.client.messages import chat_request, generate_request
from coordinator.client.stream import Call, Stream
from engine.base.errors import DeadlineExceeded, DiptychError
from engine.pb.diptych.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from engine.rpc.local_token import local_coordinator
from engine.rpc.trust import ClusterToken


class Client:
    """Blocking calls. Errors are DiptychError where the server meant one, else grpc.RpcError."""

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
        """How often an answer in progress was taken up by another call."""
        return self._coordinators.num_resumed

    def generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **options: Any
    ) -> Iterator[OutputEvent]:
        """Stream a completion; closing the iterator cancels it.

        `options`: fields of the API by name (`temperature`, `stop`, `json_schema`, `n`, ...).
        """
        return self._answer(generate_request(prompt, **options), timeout_s)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Iterator[OutputEvent]:
        """Stream the next turn of a conversation; closing the iterator cancels it.

        `options`: the same, and `tools`, `tool_choice`, `parallel_tool_calls`.
        """
        return self._answer(chat_request(messages, **options), timeout_s)

    def model(self, *, timeout_s: float = 10.0) -> inference_pb2.Model:
        """The served model."""
        methods = [stub.GetModel for stub in self._inference]
        model: inference_pb2.Model = self._ask(methods, inference_pb2.GetModelRequest(), timeout_s)
        return model

    def workers(self, *, timeout_s: float = 10.0) -> Sequence[admin_pb2.Worker]:
        """The workers that the coordinator knows."""
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

        `deadline_s`: how long they may take to finish; None: as the worker itself was told.
        `token`: the cluster's; None: that of a coordinator of this user on this machine.
        """
        request = admin_pb2.DrainWorkerRequest(worker_id=worker_id, deadline_s=deadline_s)
        methods = []
        with ExitStack() as opened:
            for stub, address in zip(self._admin, self._coordinators.addresses, strict=True):
                own = token
                if token is None and (found := local_coordinator(address)):
                    # To the address that was looked at, not to all that the name may lead to.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _answer(self, request: Any, timeout_s: float | None) -> Iterator[OutputEvent]:
        return self._events(self._coordinators.stream(request, timeout_s))

    def _events(self, stream: Stream) -> Iterator[OutputEvent]:
        clock = self._coordinators.clock
        while True:
            plan = stream.next(clock())
            if plan.wait_s > 0:
                self._sleep(plan.wait_s)
            call = self._call(stream, plan)
            with self._coordinators.ticks.by_thread(call, plan.silence_s) as silence:
                try:
                    for response in call:
                        silence.heard()
                        if event := stream.take(response):
                            silence.waiting = False
                            yield event
                            silence.waiting = True
                        if stream.done:
                            return
                    stream.lost(None, clock())
                except grpc.RpcError as error:
                    if self._coordinators.closed:
                        raise stream.broken_off("the client was closed") from None
                    if silence.over:
                        stream.silent(clock())
                    else:
                        stream.lost(error, clock())
                finally:
                    call.cancel()

    def _call(self, stream: Stream, plan: Call) -> Any:
        """One call of an answer."""
        if self._coordinators.closed:
            raise stream.broken_off("the client was closed")
        self._coordinators.called(plan.coordinator)
        method = getattr(self._inference[plan.coordinator], stream.method)
        return method(plan.request, timeout=stream.remaining_s(self._coordinators.clock()))

    def _ask(self, methods: Sequence[Any], request: Any, timeout_s: float) -> Any:
        """The answer of the first coordinator that can be reached."""
        failure: DiptychError | None = None
        for at, share_s in self._coordinators.chat_messages(timeout_s):
            try:
                return methods[at](request, timeout=share_s)
            except grpc.RpcError as error:
                failure = unreachable(error)
        raise failure or DeadlineExceeded("the call's time ran out")
