"""The HTTP server of a process: /metrics, /health (alive), /health/ready (can serve).

It runs uvicorn in the current event loop, with these differences: it installs no signal handlers;
it cuts off connections that do not send a complete request in time, or do not read the response;
it ignores a slash at the end of a path; it logs no errors that only concern a client's connection.
"""

from __future__ import annotations

import asyncio
import logging
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
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
_PREFACE_PREFIX = 4  # bytes that distinguish HTTP/2's preface from HTTP/1.1 requests
_MAX_HEAD_BYTES = 64 * 1024
_http_log = logging.getLogger("uvicorn.error.http")
_http_log.setLevel(logging.ERROR)
KEEPALIVE_S = 60.0  # proxies and clients expect idle connections to stay open that long


class _Config(uvicorn.Config):
    client_timeout_s: float
    to_grpc_clients: str
    refused: Refused


class _Protocol(H11Protocol):
    """One connection. `_timer` runs while a request is incomplete, `_unread` while the client does
    not read:

    connected -> due --complete--> served -> idle (uvicorn's keep-alive) -> closed
                  ^ '--too late--> cut off <--' unread |
                  '-------------- more bytes ----------'
    """

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _first: bytes | None = b""  # bytes held until the protocol is known; None: known
    _refusal: GrpcRefusal | None = None  # set for gRPC clients, which dialled the wrong port
    _num_unsent: int = 0  # bytes that the client had not received when `_unread` was set
    _lost: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: Connection = Connection(_MAX_HEAD_BYTES)
        self.logger = _http_log  # refusals are logged here, with their reason

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._update_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = True
        self._stop_timer()
        self._stop_unread_timer()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn does not after a reset by the peer

    def data_received(self, data: bytes) -> None:
        if self._first is not None:
            data = self._first + data
            is_prefix = len(data) < _PREFACE_PREFIX and PREFACE.startswith(data)
            self._first = data if is_prefix else None
            if self._first is not None:
                return
            if PREFACE.startswith(data[:_PREFACE_PREFIX]):
                self._refusal = GrpcRefusal(cast(_Config, self.config).to_grpc_clients)
        if self._refusal is None:
            super().data_received(data)
            self._update_timer()
            return
        response = self._refusal.take(data)
        if response is None:
            self.transport.close()
        else:
            self.transport.write(response)  # `_timer` still runs, and ends the connection

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_unread_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # data remains to be written
            self._wait_for_reader()
        if not self.cycle.response_complete:  # the next request, or part of it, has arrived
            self._update_timer()

    def send_400_response(self, msg: str) -> None:
        # If the request became invalid after it was begun, its cycle has to end too.
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        reason = self.conn.refused or msg
        cast(_Config, self.config).refused("framing")
        _log.info("http request refused", reason=reason, peer=self.client)
        try:
            super().send_400_response(f"{reason}\n")
        except LocalProtocolError:  # a response has begun or ended
            self.transport.close()
        self._wait_for_reader()

    def _unsupported_upgrade_warning(self) -> None:
        """No log line: the request is served, and Java's client always offers an upgrade."""

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._wait_for_reader()

    def _update_timer(self) -> None:
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self._timeout_s, self.transport.abort)

    @property
    def _timeout_s(self) -> float:
        return cast(_Config, self.config).client_timeout_s

    def _wait_for_reader(self) -> None:
        """Start the timer of a client that does not read: writing is paused, or data remains when
        the connection closes.
        """
        if self._unread is None and not self._lost:
            self._num_unsent = _num_unsent(self.transport)
            self._unread = self.loop.call_later(self._timeout_s, self._check_reader)

    def _check_reader(self) -> None:
        """Cut the client off, unless it reads slowly: writing resumes only after about 1 MB."""
        self._unread = None
        if _num_unsent(self.transport) < self._num_unsent:
            self._wait_for_reader()
        else:
            self.transport.abort()

    def _stop_unread_timer(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _num_unsent(transport: asyncio.Transport) -> int:
    """Bytes that the peer's machine has not acknowledged."""
    queued = array("i", [0])
    with suppress(OSError, ValueError):  # unsupported by the socket, or closed
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
    """The application: /metrics, /health, /health/ready and `routes`.

    /health fails while `alive` returns False: the process should then be restarted.
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
    """All metrics and their media type: plain text if `accept` cannot be parsed."""
    try:
        encode, content_type = choose_encoder(accept)
        return encode(registry), content_type
    except (TypeError, ValueError):  # from versions that are not numbers
        return _encoded(registry, "")


class _WithoutSlash:
    """Removes a slash at the end of a path: some clients add one, and few follow redirects."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path.endswith("/"):
            scope = {**scope, "path": path.rstrip("/") or "/"}
        await self._app(scope, receive, send)


async def _gone(_request: Request, _error: Exception) -> Response:
    """A response to a client that has gone, which avoids a traceback in the log."""
    return Response(status_code=400)


@dataclass(eq=False)
class HttpServer:
    """A running HTTP server; `address` is its real HOST:PORT."""

    address: str
    _server: _Server
    _task: asyncio.Task[None]

    async def stop(self) -> None:
        """Stop accepting, give open connections a second, and end."""
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

    It cuts off clients that do not send a complete request, or do not read, for `client_timeout_s`,
    and closes idle connections after `keepalive_s`. gRPC clients get a message with `grpc_port`.
    `allowed_hosts`, `origins`: see guard.py; `refused` counts refused requests by reason.
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
        ws="none",  # otherwise an upgrade would bypass `_Protocol` if websockets is installed
        timeout_graceful_shutdown=1,
        timeout_keep_alive=cast(int, keepalive_s),  # a timer's delay, which may be a float
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
