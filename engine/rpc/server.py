"""The gRPC server of every process; it converts errors to statuses.

Requests arrive as bytes and are parsed inside the guarded call, so that malformed bytes and invalid
UTF-8 become INVALID_ARGUMENT, and no failure becomes UNKNOWN. Servicers yield responses; the server
closes the generator at once however the call ends, which releases what it holds.

    bytes -> token? -> unpack, parse -> servicer.Method(request, context) -> yields -> context.write
               |             |               |-> DiptychError  -> status with details
               '-------------'---------------'-> anything else -> INTERNAL, logged with a traceback

Cancellation passes through: callers and deadlines end calls by it.

Slow clients are cut off: a connection without HTTP/2 preface; and after `client_timeout_s` a
connection that does not answer pings, a call without complete request, and a call whose client does
not read. streams.py handles idle streams.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from operator import methodcaller
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2

from engine.base.errors import (
    DeadlineExceeded,
    DiptychError,
    PermissionDenied,
    Unauthenticated,
    WorkersLost,
)
from engine.rpc.auth import ClusterToken
from engine.rpc.channel import (
    KEEPALIVE_S,
    LENGTH_OPTIONS,
    MAX_MESSAGE_BYTES,
    Option,
    keepalive_options,
)
from engine.rpc.listener import Listener
from engine.rpc.receive_budget import ReceiveBudget
from engine.rpc.reflection import DESCRIPTOR as REFLECTION
from engine.rpc.reflection import SERVICES as REFLECTION_SERVICES
from engine.rpc.reflection import reflection_servicer
from engine.rpc.requests import RequestReader
from engine.rpc.status import RpcStatus, internal, to_status
from engine.rpc.streams import CallerGone, Context, IdleStreams, Incoming, Writer
from engine.rpc.unpack import SERVER_OPTIONS as UNPACK_OPTIONS
from engine.rpc.unpack import Unpacker
from engine.telemetry.log import get_logger
from engine.telemetry.metrics import RpcMetrics

log = get_logger(__name__)

MAX_PENDING = 16_384

_SERVER_OPTIONS: tuple[Option, ...] = (
    *LENGTH_OPTIONS,
    # A second process on a used port fails, instead of receiving half of the calls.
    ("grpc.so_reuseport", 0),
    # Clients may ping during a silent decode.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # From a connection to its preface, and to its acknowledgement of our settings.
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.http2.settings_timeout", 10_000),
    # Accepted calls that have not started. By default gRPC cancels some beyond 1,000, and then all,
    # without a reason; admission refuses excess calls with a reason.
    ("grpc.server.max_pending_requests", MAX_PENDING),
    ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING),
    # Before a read a stream buffers at most 64 KiB, whatever its bandwidth.
    ("grpc.http2.bdp_probe", 0),
    *UNPACK_OPTIONS,
)


@dataclass(frozen=True, slots=True)
class _Terms:
    """How the calls of a service are served; see `add_service`."""

    budget: ReceiveBudget
    limit_s: float | None = None
    token: ClusterToken | None = None
    guarded: Collection[str] | None = None
    alive: Callable[[Any], Message | None] = lambda request: None


class RpcServer:
    """A gRPC server with health and reflection.

    Order of use: add_service, listen, start, set_serving, stop.
    """

    def __init__(
        self,
        metrics: RpcMetrics | None = None,
        *,
        client_timeout_s: float = KEEPALIVE_S,
        max_request_bytes: int = MAX_MESSAGE_BYTES,
        budget: ReceiveBudget | None = None,
        reflection: bool = True,
    ) -> None:
        """`budget` bounds the received bytes, shared with other servers; None: unbounded."""
        self._metrics = metrics
        self._reflection = reflection
        self._client_timeout_s = client_timeout_s
        self._max_request_bytes = max_request_bytes
        self._budget = budget or ReceiveBudget()
        options = dict((*_SERVER_OPTIONS, *keepalive_options(client_timeout_s)))
        options["grpc.max_receive_message_length"] = max_request_bytes
        self._listener = Listener(tuple(options.items()), self._died)
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []
        self._started = False
        self._unpacker = Unpacker(max_request_bytes)

    def add_service(
        self,
        descriptor: ServiceDescriptor,
        servicer: object,
        *,
        limit_s: float | None = None,
        token: ClusterToken | None = None,
        guarded: Collection[str] | None = None,
        alive: Callable[[Any], Message | None] = lambda request: None,
        is_counted: bool = True,
    ) -> None:
        """Serve each method of `descriptor` with the method of the same name of `servicer`.

        Server streams are async generators `Method(request, context)`, other methods coroutines.
        A stream of requests is an async iterator. A call without deadline ends after `limit_s`.
        With a `token` callers must send it, to the methods `guarded` or to all. If `alive` returns
        a message for a request, the stream sends it each second in which it sends nothing else.
        `is_counted`: received bytes count in the budget.
        """
        self._names.append(descriptor.full_name)
        budget = self._budget if is_counted else ReceiveBudget()
        terms = _Terms(budget, limit_s, token, guarded, alive)
        self._add(descriptor.full_name, descriptor, servicer, terms)

    def listen(self, address: str) -> int:
        """Bind HOST:PORT and return the port. Raises ConfigError."""
        return self._listener.listen(address)

    async def start(self, *, serving: bool = True) -> None:
        """Begin to accept calls."""
        service: Any = health_pb2.DESCRIPTOR.services_by_name["Health"]
        terms = _Terms(self._budget)
        self._add(health.SERVICE_NAME, service, self._health, terms)
        reflection = reflection_servicer((*self._names, health.SERVICE_NAME))
        for name in REFLECTION_SERVICES if self._reflection else ():
            self._add(name, REFLECTION, reflection, terms)
        await self.set_serving(serving)
        await self._listener.start()
        self._started = True

    async def set_serving(self, serving: bool, *names: str) -> None:
        """Set the health status of `names`; without names, of the server and all services."""
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if serving else statuses.NOT_SERVING
        for name in names or ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Refuse new calls at once, give running calls `grace_s`, then cancel them."""
        if self._started:
            await self._health.enter_graceful_shutdown()
        await self._listener.stop(grace_s)

    def _died(self) -> None:
        if self._metrics:
            self._metrics.failed("server", "died")

    def _add(
        self, name: str, descriptor: ServiceDescriptor, servicer: object, terms: _Terms
    ) -> None:
        handlers = {
            method.name: self._handler(method, getattr(servicer, method.name), terms)
            for method in descriptor.methods
        }
        self._listener.add(grpc.method_handlers_generic_handler(name, handlers))

    def _handler(
        self, method: MethodDescriptor, behaviour: Callable[..., Any], terms: _Terms
    ) -> grpc.RpcMethodHandler[Any, Any]:
        is_guarded = terms.guarded is None or method.name in terms.guarded
        token = terms.token if is_guarded else None
        requests = RequestReader(
            method, token, self._client_timeout_s, self._unpacker, self._max_request_bytes
        )
        new_lease, limit_s, alive = terms.budget.lease, terms.limit_s, terms.alive
        full_name = f"{method.containing_service.name}/{method.name}"
        writes = inspect.iscoroutinefunction(behaviour)  # like grpcio-health's Watch
        may_idle = method.server_streaming and (writes or method.client_streaming)
        idle_streams = IdleStreams() if may_idle else None

        async def stream(raw: AsyncIterator[bytes], context: Context) -> None:
            writer = Writer(context, self._client_timeout_s)

            async def body() -> None:
                with new_lease(_peer(context)) as lease, ExitStack() as counted:
                    request = await requests.of(raw, context, lease)
                    if idle_streams:  # counted after the token is checked
                        counted.enter_context(idle_streams.opened(context.peer()))
                    if writes:
                        await behaviour(request, writer)
                        return
                    try:
                        writer.send_alive(alive(request))
                        async with aclosing(behaviour(request, context)) as responses:
                            async for response in responses:
                                await writer.write(response)
                        await writer.finish()
                    finally:
                        writer.close()
                        if isinstance(request, Incoming):
                            request.close()

            await self._guard(full_name, context, body, limit_s, writer)

        async def unary(raw: AsyncIterator[bytes], context: Context) -> Any:
            async def body() -> Any:
                with new_lease(_peer(context)) as lease:
                    return await behaviour(await requests.of(raw, context, lease), context)

            return await self._guard(full_name, context, body, limit_s)

        # For unary requests gRPC would wait without limit for the message of a call.
        make: Any = grpc.stream_unary_rpc_method_handler
        if method.server_streaming:
            make = grpc.stream_stream_rpc_method_handler
        handler: grpc.RpcMethodHandler[Any, Any] = make(
            stream if method.server_streaming else unary,
            request_deserializer=None,
            response_serializer=methodcaller("SerializeToString"),
        )
        return handler

    async def _guard(
        self,
        method: str,
        context: Context,
        body: Callable[[], Awaitable[Any]],
        limit_s: float | None,
        writer: Writer | None = None,
    ) -> Any:
        """Run one call: failures become statuses, cancellation passes through."""
        limit = asyncio.timeout(limit_s if context.time_remaining() is None else None)
        of_call = log.bind(method=method)
        try:
            async with limit:
                return await body()
        except DiptychError as error:
            failure = to_status(error)
            if failure.code is grpc.StatusCode.INTERNAL and not isinstance(error, WorkersLost):
                of_call.exception("call failed")
            elif isinstance(error, Unauthenticated | PermissionDenied):
                of_call.warning("caller refused", peer=context.peer(), reason=error.message)
            else:
                of_call.info("call refused", code=failure.code.name, reason=error.message)
        except grpc.aio.AbortError:
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if context.cancelled() or (task and task.cancelling()):
                raise
            of_call.exception("call failed: something it waited for was cancelled")
            failure = internal("internal error; see the server's log")
        except Exception as error:
            failure = internal("internal error; see the server's log")
            if isinstance(error, TimeoutError) and limit.expired():
                failure = to_status(DeadlineExceeded(f"the call took longer than {limit_s:g} s"))
            elif isinstance(error, CallerGone) or context.cancelled():
                of_call.debug("call ended after its caller had gone", exc_info=True)
                failure = RpcStatus(grpc.StatusCode.CANCELLED, "the caller has gone", ())
            else:
                of_call.exception("call failed")
        if self._metrics and failure.code is not grpc.StatusCode.CANCELLED:
            self._metrics.failed(method, failure.code.name.lower())
        if writer:
            await writer.settle()
        return await self._abort(method, context, failure)

    async def _abort(self, method: str, context: Context, failure: RpcStatus) -> None:
        try:
            await context.abort(
                failure.code, details=failure.message, trailing_metadata=failure.trailing_metadata
            )
        except grpc.aio.AbortError:
            raise
        except Exception:  # the caller has gone, or gRPC has refused its message
            log.debug("call ended before its status", method=method, exc_info=True)
            raise asyncio.CancelledError from None


def _peer(context: Context) -> str:
    """ADDRESS:PORT of the client, in the form that the HTTP server uses."""
    return unquote(context.peer()).partition(":")[2]
