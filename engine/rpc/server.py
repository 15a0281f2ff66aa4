"""The door of every process: a grpc.aio server that turns our errors into statuses.

Requests arrive as bytes and are parsed here, inside the guarded call, so that malformed bytes and
invalid UTF-8 are the caller's error and nothing becomes UNKNOWN. Our servicers write responses by
yielding; the generator is closed by us, at once, however the call ends, so that what it holds is
released before the next message of anybody.

    bytes -> token? -> parse -> servicer.Method(request, context) -> yields -> context.write
               |         |            |-> DiptychError  -> status with details
               '---------'------------'-> anything else -> INTERNAL, logged with its traceback

Cancellation passes through: it is how a caller, or its deadline, ends a call.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing, suppress
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from engine.errors import (
    ConfigError,
    DeadlineExceeded,
    DiptychError,
    InvalidRequest,
    PermissionDenied,
    Unauthenticated,
)
from engine.rpc.address import listen_on
from engine.rpc.channel import KEEPALIVE_OPTIONS, LENGTH_OPTIONS
from engine.rpc.reflection import enable_reflection
from engine.rpc.status import RpcStatus, internal, to_status
from engine.rpc.trust import ClusterToken
from engine.telemetry.log import bind_request, get_logger
from engine.telemetry.metrics import RpcMetrics

log = get_logger(__name__)

_SERVER_OPTIONS = (
    *LENGTH_OPTIONS,
    *KEEPALIVE_OPTIONS,
    # A second process on a used port fails instead of taking half the calls.
    ("grpc.so_reuseport", 0),
    # Clients may ping during a silent decode without being cut.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)

_HEAR_S = 1.0

Context = grpc.aio.ServicerContext[Any, Any]


class RpcServer:
    """A gRPC server with health and reflection.

    Order of use: add_service, listen, start, set_serving, stop.
    """

    def __init__(self, metrics: RpcMetrics | None = None) -> None:
        self._metrics = metrics
        self._server = grpc.aio.server(options=_SERVER_OPTIONS)
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []
        self._started = False
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def add_service(
        self,
        descriptor: ServiceDescriptor,
        servicer: object,
        *,
        limit_s: float | None = None,
        token: ClusterToken | None = None,
        guarded: Collection[str] | None = None,
    ) -> None:
        """Serve every method of `descriptor` by the method of the same name of `servicer`.

        Server streams are async generators `Method(request, context)`, the others coroutines. With
        a stream of requests, `request` is an async iterator. A call that brings no deadline ends
        after `limit_s`, also while its caller does not read. With a `token` callers have to bring
        it, to the methods `guarded` or to all.
        """
        handlers = {
            method.name: self._handler(
                method,
                getattr(servicer, method.name),
                limit_s,
                token if guarded is None or method.name in guarded else None,
            )
            for method in descriptor.methods
        }
        generic = grpc.method_handlers_generic_handler(descriptor.full_name, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        self._names.append(descriptor.full_name)

    def listen(self, address: str) -> int:
        """Bind HOST:PORT and return the port; raises ConfigError where that fails."""
        listen_on(address).close()  # a probe: where it fails it says why, and gRPC would only log
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConfigError(f"cannot listen on {address}: address already in use")
        return port

    async def start(self, *, serving: bool = True) -> None:
        """Begin to accept calls."""
        enable_reflection((*self._names, health.SERVICE_NAME), self._server)
        await self.set_serving(serving)
        await self._server.start()
        self._started = True

    async def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 answers, for the server and for each of its services."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new calls at once, give those that run `grace_s`, then cancel them."""
        if self._started:
            await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def wait(self) -> None:
        """Until the server has stopped."""
        await self._server.wait_for_termination()

    def _handler(
        self,
        method: MethodDescriptor,
        behaviour: Callable[..., Any],
        limit_s: float | None,
        token: ClusterToken | None,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """The grpc handler of one method: bytes in, messages out."""
        request_class = message_factory.GetMessageClass(method.input_type)
        full_name = f"{method.containing_service.name}/{method.name}"

        def parse(raw: bytes) -> Message:
            request = _parse(request_class, raw)
            if request_id := getattr(request, "request_id", ""):
                bind_request(request_id[:128])
            return request

        async def parse_all(raw: AsyncIterator[bytes]) -> AsyncIterator[Message]:
            async for item in raw:
                yield _parse(request_class, item)

        convert = parse_all if method.client_streaming else parse

        async def admit(raw: Any, context: Context) -> None:
            try:
                if token is not None:
                    token.check(context.invocation_metadata())
            except DiptychError:
                if method.client_streaming:
                    await _hear_one(raw)
                raise

        async def stream(raw: Any, context: Context) -> None:
            async def body() -> None:
                await admit(raw, context)
                async with aclosing(behaviour(convert(raw), context)) as responses:
                    async for response in responses:
                        await context.write(response)

            await self._guard(full_name, context, body, limit_s)

        async def unary(raw: Any, context: Context) -> Any:
            async def body() -> Any:
                await admit(raw, context)
                return await behaviour(convert(raw), context)

            return await self._guard(full_name, context, body, limit_s)

        make: Any = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[method.client_streaming, method.server_streaming]
        serialize: Any = message_factory.GetMessageClass(method.output_type).SerializeToString
        handler: grpc.RpcMethodHandler[Any, Any] = make(
            stream if method.server_streaming else unary,
            request_deserializer=None,
            response_serializer=serialize,
        )
        return handler

    async def _guard(
        self,
        method: str,
        context: Context,
        body: Callable[[], Awaitable[Any]],
        limit_s: float | None,
    ) -> Any:
        """Run one call: every failure becomes a status, cancellation passes through."""
        limit = asyncio.timeout(limit_s if context.time_remaining() is None else None)
        try:
            async with limit:
                return await body()
        except DiptychError as error:
            failure = to_status(error)
            if failure.code is grpc.StatusCode.INTERNAL:
                log.exception("call failed", method=method)
            elif isinstance(error, Unauthenticated | PermissionDenied):
                log.warning(
                    "caller refused", method=method, peer=context.peer(), reason=error.message
                )
            else:
                log.info(
                    "call refused", method=method, code=failure.code.name, reason=error.message
                )
        except grpc.aio.AbortError:
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if context.cancelled() or (task and task.cancelling()):
                raise
            log.exception("call failed: something it waited for was cancelled", method=method)
            failure = internal("internal error; the server's log tells more")
        except Exception as error:
            failure = internal("internal error; the server's log tells more")
            if isinstance(error, TimeoutError) and limit.expired():
                failure = to_status(DeadlineExceeded(f"the call took longer than {limit_s:g} s"))
            elif context.cancelled():  # writing to a caller who has gone
                log.debug("call ended after its caller had gone", method=method, exc_info=True)
            else:
                log.exception("call failed", method=method)
        return await self._abort(method, context, failure)

    async def _abort(self, method: str, context: Context, failure: RpcStatus) -> None:
        if self._metrics:
            self._metrics.failed(method, failure.code.name.lower())
        await context.abort(
            failure.code, details=failure.message, trailing_metadata=failure.trailing_metadata
        )


async def _hear_one(raw: AsyncIterator[bytes]) -> None:
    """Take one message off a stream that is refused, unread.

    A caller whose first write comes after our refusal is told INTERNAL by its own gRPC instead.
    """
    with suppress(TimeoutError, StopAsyncIteration):
        async with asyncio.timeout(_HEAR_S):
            await anext(aiter(raw))


def _parse(request_class: type[Message], raw: bytes) -> Message:
    """One message; raises InvalidRequest for bytes that are none, invalid UTF-8 included."""
    try:
        return request_class.FromString(raw)
    except DecodeError as error:
        what = "a string that is not valid UTF-8" if "UTF-8" in str(error) else "malformed bytes"
        raise InvalidRequest(
            "request", f"{what} where a {request_class.DESCRIPTOR.full_name} was expected"
        ) from None
