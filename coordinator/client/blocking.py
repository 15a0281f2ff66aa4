"""The blocking client, usable from any thread: it makes the calls and waits of `Stream`.

A call is open from the first event until the iterator ends, is closed or is garbage-collected.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

import grpc

from coordinator.client.base import BaseClient, channel_options, unreachable
from coordinator.client.events import OutputEvent
from coordinator.client.stream import Stream
from engine.base.errors import DeadlineExceeded, DiptychError
from engine.pb.diptych.v1 import admin_pb2, admin_pb2_grpc, inference_pb2
from engine.rpc.auth import ClusterToken
from engine.rpc.local_token import local_coordinator


class Client(BaseClient[Iterator[OutputEvent]]):
    """A blocking client. Its errors are DiptychError, or grpc.RpcError for unknown statuses."""

    _open_channel = staticmethod(grpc.insecure_channel)

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
            for stub, address in zip(self._admin, self._addresses, strict=True):
                own = token
                if token is None and (found := local_coordinator(address)):
                    # Call the examined address: the name may have others.
                    own = found[1]
                    options = channel_options(self._retry_policy)
                    channel = grpc.insecure_channel(found[0], options=options)
                    stub = admin_pb2_grpc.AdminServiceStub(opened.enter_context(channel))
                metadata = own.metadata if own else ()
                methods.append(partial(stub.DrainWorker, metadata=metadata))
            self._ask(methods, request, timeout_s)

    def close(self) -> None:
        """Close the connections; calls on them are cancelled."""
        self._closed = True
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _events(self, stream: Stream) -> Iterator[OutputEvent]:
        clock = self._clock
        while True:
            plan = stream.next(clock())
            if plan.wait_s > 0:
                time.sleep(plan.wait_s)
            call = self._call(stream, plan)
            with self._monitor.watch_from_thread(call, plan.silence_s) as silence:
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
                    if self._closed:
                        raise stream.interrupted("the client was closed") from None
                    if silence.is_over:
                        stream.silent(clock())
                    else:
                        stream.lost(error, clock())
                finally:
                    call.cancel()

    def _ask(self, methods: Sequence[Any], request: Any, timeout_s: float) -> Any:
        """The response of the first coordinator that can be reached."""
        failure: DiptychError | None = None
        for at, share_s in self._each_with_timeout(timeout_s):
            try:
                return methods[at](request, timeout=share_s)
            except grpc.RpcError as error:
                failure = unreachable(error)
        raise failure or DeadlineExceeded("the call's time ran out")
