"""The HTTP side door of a process: /metrics, /health (it lives), /health/ready (it can serve).

It runs in the event loop that is there. Signals stay with their owner: uvicorn would take them.
A connection that brings no whole request in time, or does not read its answer, is cut off: uvicorn
would keep it for ever.
"""

from __future__ import annotations

import asyncio
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
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from engine.errors import ConfigError
from engine.rpc.address import listen_on

CLIENT_TIMEOUT_S = 30.0


class _Config(uvicorn.Config):
    client_timeout_s: float


class _Protocol(H11Protocol):
    """One connection. `_timer` runs while a request is due, `_unread` while a reader is waited for:

    connected -> due --all of it is here--> served -> idle (uvicorn's keep-alive) -> closed
                  ^ '--too late--> cut off <--' unread |
                  '-------------- more bytes ----------'
    """

    _timer: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _left: int = 0  # bytes that the peer had not taken when `_unread` was set

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._is_read()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

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
        try:
            super().send_400_response(msg)
        except LocalProtocolError:  # an answer has begun, or is over
            self.transport.close()
        self._wait_for_reader()

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
        if self._unread is None:
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
    with suppress(OSError):  # not for every kind of socket
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
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), media_type=content_type)

    async def health(_request: Request) -> Response:
        return PlainTextResponse("ok\n") if alive() else PlainTextResponse("stuck\n", 503)

    async def health_ready(_request: Request) -> Response:
        return PlainTextResponse("ready\n") if ready() else PlainTextResponse("not ready\n", 503)

    own = [
        Route("/metrics", metrics),
        Route("/health", health),
        Route("/health/ready", health_ready),
    ]
    return Starlette(routes=[*own, *routes], exception_handlers={ClientDisconnect: _gone})


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
    app: Starlette, address: str, *, client_timeout_s: float = CLIENT_TIMEOUT_S
) -> HttpServer:
    """Serve `app` on HOST:PORT (port 0: a free one) in this event loop. Raises ConfigError.

    Connections that within `client_timeout_s` bring no whole request, or read nothing, are cut off.
    """
    sock = listen_on(address)
    config = _Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        http=_Protocol,
        timeout_graceful_shutdown=1,
    )
    config.client_timeout_s = client_timeout_s
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[sock]), name="http")
    while not server.started:
        if task.done():
            await task
            raise ConfigError(f"cannot serve HTTP on {address}")
        await asyncio.sleep(0.01)
    host = address.rpartition(":")[0]
    return HttpServer(f"{host}:{sock.getsockname()[1]}", server, task)
