"""The HTTP side door of a process: /metrics, /health (it lives), /health/ready (it can serve).

It runs in the event loop that is there. Signals stay with their owner: uvicorn would take them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from engine.errors import ConfigError
from engine.rpc.address import listen_on


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
    return Starlette(routes=[*own, *routes])


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


async def serve_http(app: Starlette, address: str) -> HttpServer:
    """Serve `app` on HOST:PORT (port 0: a free one) in this event loop. Raises ConfigError."""
    sock = listen_on(address)
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[sock]), name="http")
    while not server.started:
        if task.done():
            await task
            raise ConfigError(f"cannot serve HTTP on {address}")
        await asyncio.sleep(0.01)
    host = address.rpartition(":")[0]
    return HttpServer(f"{host}:{sock.getsockname()[1]}", server, task)
