"""The HTTP side door of a process: /metrics, /health (it lives), /health/ready (it can serve).

A path that ends in a slash is the path without it. The server runs in the event loop that is there.
Signals stay with their owner: uvicorn would take them. A connection that brings no whole request in
time, or does not read its answer, is cut off: uvicorn would keep it for ever. What a client does
with its connection is no error of this process.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fcntl import ioctl
from termios import TIOCOUTQ
from typing import Any, cast

import uvicorn
from h11 import LocalProtocolError
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.base.errors import ConfigError
from engine.http.framing import Connection
from engine.http.grpc_refusal import PREFACE, GrpcRefusal
from engine.http.guard import AllowedHosts, Guard, Refused
from engine.rpc.address import listen_on
from engine.telemetry.log import get_logger

_log = get_logger(__name__)

CLIENT_TIMEOUT_S = 30.0
_TELLING = 4  # bytes by which HTTP/2's preface differs from any request of HTTP/1.1
_MAX_HEAD_BYTES = 64 * 1024
_http_log = logging.getLogger("uvicorn.error.http")
_http_log.setLevel(logging.ERROR)
KEEPALIVE_S = 60.0  # what proxies and clients expect of a connection that rests


class _Config(uvicorn.Config):
    client_timeout_s: float
    to_grpc_clients: str
    refused: Refused


class _Protocol(H11Protocol):
    """One connection. `_timer` runs while a request is due, `_unread` while a reader is waited for:

    connected -> due --all of it is here--> served -> idle (uvicorn's keep-alive) -> closed
                  ^ '--too late--> cut off <--' unread |
                  '-------------- more bytes ----------'
    """

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _first: bytes | None = b""  # bytes held until the protocol is known; None: it is
    _refusal: GrpcRefusal | None = None  # of a gRPC client, which has taken the wrong port
    _left: int = 0  # bytes that the peer had not taken when `_unread` was set
    _lost: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: Connection = Connection(_MAX_HEAD_BYTES)
        self.logger = _http_log  # a refusal is logged here, with its reason

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._stop_timer()
        self._is_read()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # which uvicorn forgets where the peer has reset

    def data_received(self, data: bytes) -> None:
        if self._first is not None:
            data = self._first + data
            self._first = data if len(data) < _TELLING and PREFACE.startswith(data) else None
            if self._first is not None:
                return
            if PREFACE.startswith(data[:_TELLING]):
                self._refusal = GrpcRefusal(cast(_Config, self.config).to_grpc_clients)
        if self._refusal is None:
            super().data_received(data)
            self._look()
            return
        answer = self._refusal.take(data)
        if answer is None:
            self.transport.close()
        else:
            self.transport.write(answer)  # `_timer` runs on, and ends it

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._is_read()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # with what is not written yet
            self._wait_for_reader()
        if not self.cycle.response_complete:  # the next one was here already, or a part of it
            self._look()

    def send_400_response(self, msg: str) -> None:
        """Where a request turns out to be none after it was begun, nobody else answers it."""
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        reason = self.conn.refused or msg
        cast(_Config, self.config).refused("framing")
        _log.info("http request refused", reason=reason, peer=self.client)
        try:
            super().send_400_response(f"{reason}\n")
        except LocalProtocolError:  # an answer has begun, or is over
            self.transport.close()
        self._wait_for_reader()

    def _unsupported_upgrade_warning(self) -> None:
        """No log line: the request is served all the same, and Java's client asks for HTTP/2."""

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._wait_for_reader()

    def _look(self) -> None:
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._timeout_s, self.transport.abort)

    @property
    def _timeout_s(self) -> float:
        return cast(_Config, self.config).client_timeout_s

    def _wait_for_reader(self) -> None:
        """While nothing can be written, or a closing connection has something left to write."""
        if self._unread is None and not self._lost:
            self._left = _num_left(self.transport)
            self._unread = self.loop.call_later(self._timeout_s, self._look_at_reader)

    def _look_at_reader(self) -> None:
        """One who reads slowly goes on: the kernel lets us write again after a megabyte or so."""
        self._unread = None
        if _num_left(self.transport) < self._left:
            self._wait_for_reader()
        else:
            self.transport.abort()

    def _is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _num_left(transport: asyncio.Transport) -> int:
    """Bytes on their way that the peer's machine has not acknowledged."""
    queued = array("i", [0])
    with suppress(OSError, ValueError):  # not for every kind of socket, nor for one that is closed
        ioctl(transport.get_extra_info("socket").fileno(), TIOCOUTQ, queued)
    return transport.get_write_buffer_size() + queued[0]


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def make_app(
    registry: CollectorRegistry,
    ready: Callable[[], bool],
    routes: Sequence[BaseRoute] = (),
    alive: Callable[[], bool] = lambda: True,
) -> Starlette:
    """The application; `routes` are a process's own, beside the three that all have.

    Where `alive` says no, whoever starts this process should start it anew.
    """

    async def metrics(request: Request) -> Response:
        body, content_type = _encoded(registry, request.headers.get("accept", ""))
        return Response(body, media_type=content_type)

    async def health(_request: Request) -> Response:
        return PlainTextResponse("ok\n") if alive() else PlainTextResponse("stuck\n", 503)

    async def health_ready(_request: Request) -> Response:
        return PlainTextResponse("ready\n") if ready() else PlainTextResponse("not ready\n", 503)

    own = [
        Route("/metrics", metrics),
        Route("/health", health),
        Route("/health/ready", health_ready),
    ]
    app = Starlette(
        routes=[*own, *routes],
        middleware=[Middleware(_WithoutSlash)],
        exception_handlers={ClientDisconnect: _gone},
    )
    app.router.redirect_slashes = False
    return app


def _encoded(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """All metrics and their media type, as plain text where `accept` is none that is understood."""
    try:
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type
    except (TypeError, ValueError):  # the library takes any version for numbers
        encode, content_type = choose_encoder("")
        return encode(registry), content_type


class _WithoutSlash:
    """Takes the slash off the end of a path: some clients put one there, and few follow when they
    are sent elsewhere.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.endswith("/"):
            scope = {**scope, "path": path.rstrip("/") or "/"}
        await self._app(scope, receive, send)


async def _gone(_request: Request, _error: Exception) -> Response:
    """Nobody hears it; without it a caller who leaves in the middle of a body is a traceback."""
    return Response(status_code=400)


class HttpServer:
    """A running HTTP server; `address` is its real HOST:PORT."""

    def __init__(self, address: str, server: _Server, task: asyncio.Task[None]) -> None:
        self.address = address
        self._server = server
        self._task = task

    async def stop(self) -> None:
        """Stop accepting and end; open connections are given a second."""
        self._server.should_exit = True
        await asyncio.wait([self._task], timeout=2.0)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def serve_http(
    app: ASGIApp,
    address: str,
    *,
    client_timeout_s: float = CLIENT_TIMEOUT_S,
    keepalive_s: float = KEEPALIVE_S,
    grpc_port: int = 0,
    allowed_hosts: str = "*",
    origins: str = "",
    refused: Refused = lambda reason: None,
) -> HttpServer:
    """Serve `app` on HOST:PORT (port 0: a free one) in this event loop. Raises ConfigError.

    Connections that within `client_timeout_s` bring no whole request, or read nothing, are cut off;
    those between two requests are closed after `keepalive_s`. `grpc_port`: this process's, for
    gRPC clients that come here. `allowed_hosts`, `origins`: see http_guard; `refused` counts what
    is refused.
    """
    sock = listen_on(address)
    hosts = AllowedHosts.of(allowed_hosts, address, sock.getsockname()[0])
    config = _Config(
        Guard(app, hosts, origins, refused),
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        http=_Protocol,
        ws="none",  # else a request to upgrade goes round `_Protocol` where the library is there
        timeout_graceful_shutdown=1,
        timeout_keep_alive=cast(int, keepalive_s),  # a timer's delay, whatever its type says
    )
    config.client_timeout_s = client_timeout_s
    config.refused = refused
    config.to_grpc_clients = "this is an HTTP port"
    if grpc_port:
        config.to_grpc_clients += f"; the gRPC port of this process is {grpc_port}"
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[sock]), name="http")
    while not server.started:
        if task.done():
            await task
            raise ConfigError(f"cannot serve HTTP on {address}")
        await asyncio.sleep(0.01)
    host = address.rpartition(":")[0]
    return HttpServer(f"{host}:{sock.getsockname()[1]}", server, task)
