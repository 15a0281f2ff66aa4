"""A grpc.aio server that is replaced when it dies.

A grpc.aio server stops accepting calls when its accept loop raises, which a call with a method name
that is not UTF-8 causes. Running calls continue, so the dead server is kept until they end, and a
new server with the same handlers listens on the same address within milliseconds. Calls that arrive
in between fail with CANCELLED or UNAVAILABLE.

    listen -> start -> serving --accept loop raised--> dead: running calls continue
                          ^                              |
                          '-------- new server ----------'        stop: stops all of them
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc

from engine.base.errors import ConfigError
from engine.rpc.address import listen_on
from engine.rpc.channel import Option
from engine.telemetry.log import get_logger

log = get_logger(__name__)

_POLL_S = 0.1
_BIND_RETRY_S = 0.005
_BIND_S = 2.0  # gRPC may fail to bind a port that the probe has just had
_LONGEST_CALL_S = 24 * 3600.0  # on a dead server
_DEAD = "the gRPC server died and is replaced"


class Listener:
    """A server on one address. Calls `on_death` each time the server is replaced."""

    def __init__(self, options: Sequence[Option], on_death: Callable[[], None]) -> None:
        self._options = options
        self._on_death = on_death
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._address = ""
        self._server = self._make()
        self._dead: dict[grpc.aio.Server, asyncio.Task[None]] = {}
        self._supervisor: asyncio.Task[None] | None = None

    def add(self, handler: grpc.GenericRpcHandler) -> None:
        """Add a handler for more methods."""
        self._handlers.append(handler)
        self._server.add_generic_rpc_handlers((handler,))

    def listen(self, address: str) -> int:
        """Bind HOST:PORT and return the port. Raises ConfigError."""
        listen_on(address).close()  # a probe, because gRPC only logs the reason of a failure
        until_s = time.monotonic() + _BIND_S
        while (port := self._bind(address)) == 0 and time.monotonic() < until_s:
            time.sleep(_POLL_S)  # seen when a worker restarts on the port of its predecessor
        if port == 0:
            raise ConfigError(f"cannot listen on {address}: address already in use")
        self._address = f"{address.rpartition(':')[0]}:{port}"
        return port

    async def start(self) -> None:
        """Begin to accept calls."""
        _filter_client_errors()
        accepting = await _start(self._server)
        self._supervisor = asyncio.create_task(
            self._supervise(accepting), name=f"listener {self._address}"
        )

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls at once, give running calls `grace_s`, then cancel them."""
        if self._supervisor:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        await asyncio.gather(*(s.stop(grace_s) for s in (self._server, *self._dead)))
        await asyncio.gather(*self._dead.values(), return_exceptions=True)

    async def _supervise(self, accepting: set[asyncio.Task[Any]]) -> None:
        while True:
            if accepting:
                await asyncio.wait(accepting, timeout=_POLL_S)
            else:
                await asyncio.sleep(_POLL_S)
            if _is_running(self._server) and not any(task.done() for task in accepting):
                continue
            log.error(_DEAD, address=self._address)
            self._on_death()
            self._dead[self._server] = asyncio.create_task(self._stop_dead(self._server))
            self._server = self._make()
            # The dead server still holds the port for a moment.
            while not self._bind(self._address):  # noqa: ASYNC110
                await asyncio.sleep(_BIND_RETRY_S)
            accepting = await _start(self._server)

    async def _stop_dead(self, dead: grpc.aio.Server) -> None:
        """Release a dead server when its last call has ended."""
        await dead.stop(_LONGEST_CALL_S)
        del self._dead[dead]

    def _make(self) -> grpc.aio.Server:
        server = grpc.aio.server(options=self._options)
        server.add_generic_rpc_handlers(tuple(self._handlers))
        return server

    def _bind(self, address: str) -> int:
        try:
            return self._server.add_insecure_port(address)
        except RuntimeError:
            return 0


async def _start(server: grpc.aio.Server) -> set[asyncio.Task[Any]]:
    """Start the server; returns its accept task, which ends when the server dies. gRPC does not
    expose it, so it is found by name; empty if gRPC renames it.
    """
    before = asyncio.all_tasks()
    await server.start()
    new = asyncio.all_tasks() - before
    return {t for t in new if getattr(t.get_coro(), "__name__", "") == "_server_main_loop"}


def _is_running(server: Any) -> bool:
    """Whether the server accepts calls; gRPC has no public method for it."""
    return bool(server._server.is_running())


def _filter_client_errors() -> None:
    """Suppress tracebacks that gRPC logs for headers that are not UTF-8 and for vanished clients.

    They are harmless, and the end of the call is logged separately.
    """
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_client_error)
    logging.getLogger("asyncio").addFilter(_is_no_death)


def _is_no_client_error(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(("Invalid encoding on", "ExecuteBatchError raised in"))


def _is_no_death(record: logging.LogRecord) -> bool:
    """False for the second report of a server's death, from an unreferenced task of gRPC."""
    error = record.exc_info[1] if record.exc_info else None
    is_of_cython = "<coroutine without __name__>" in str(record.msg)
    return not (isinstance(error, UnicodeDecodeError) and is_of_cython)
