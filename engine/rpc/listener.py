"""A grpc.aio server that another one takes the place of when it dies.

grpc.aio ends a server for good when its accepting loop raises, and one call does that whose method
is no UTF-8. What runs on the dead one goes on; so it is kept until `stop`, and a new one with the
same handlers listens on the same address within milliseconds. Who calls in just these is told
CANCELLED or UNAVAILABLE.

    listen -> start -> serving --its loop raised--> dead: calls in progress go on
                          ^                          |
                          '---- another one ---------'   stop: all of them
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

_LOOK_S = 0.1
_AGAIN_S = 0.005
_BIND_S = 2.0  # for a port that the probe had and gRPC does not get at once
_LONGEST_CALL_S = 24 * 3600.0  # on a dead server
_DEAD = "the gRPC server died; another one takes its place"


class Listener:
    """One address. `on_death` is told when a server had to be replaced."""

    def __init__(self, options: Sequence[Option], on_death: Callable[[], None]) -> None:
        self._options = options
        self._on_death = on_death
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._address = ""
        self._server = self._make()
        self._dead: dict[grpc.aio.Server, asyncio.Task[None]] = {}
        self._keeper: asyncio.Task[None] | None = None

    def add(self, handler: grpc.GenericRpcHandler) -> None:
        """Serve these methods too."""
        self._handlers.append(handler)
        self._server.add_generic_rpc_handlers((handler,))

    def listen(self, address: str) -> int:
        """Bind HOST:PORT and return the port; raises ConfigError where that fails."""
        listen_on(address).close()  # a probe: where it fails it says why, and gRPC would only log
        until_s = time.monotonic() + _BIND_S
        while (port := self._bind(address)) == 0 and time.monotonic() < until_s:
            time.sleep(_LOOK_S)  # seen where a worker starts again on the port of its predecessor
        if port == 0:
            raise ConfigError(f"cannot listen on {address}: address already in use")
        self._address = f"{address.rpartition(':')[0]}:{port}"
        return port

    async def start(self) -> None:
        """Begin to accept calls."""
        _be_quiet_about_callers()
        accepting = await _start(self._server)
        self._keeper = asyncio.create_task(self._keep(accepting), name=f"keep {self._address}")

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls at once, give those that run `grace_s`, then cancel them."""
        if self._keeper:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await asyncio.gather(*(s.stop(grace_s) for s in (self._server, *self._dead)))
        await asyncio.gather(*self._dead.values(), return_exceptions=True)

    async def _keep(self, accepting: set[asyncio.Task[Any]]) -> None:
        while True:
            if accepting:
                await asyncio.wait(accepting, timeout=_LOOK_S)
            else:
                await asyncio.sleep(_LOOK_S)
            if _is_running(self._server) and not any(task.done() for task in accepting):
                continue
            log.error(_DEAD, address=self._address)
            self._on_death()
            self._dead[self._server] = asyncio.create_task(self._bury(self._server))
            self._server = self._make()
            # The dead one has the port for a moment more.
            while not self._bind(self._address):  # noqa: ASYNC110
                await asyncio.sleep(_AGAIN_S)
            accepting = await _start(self._server)

    async def _bury(self, dead: grpc.aio.Server) -> None:
        """Let go of a server when its last call has ended."""
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
    """Begin; returns the task that accepts calls, which the library keeps to itself: with its end
    the server has died. Nothing, where the library has another name for it.
    """
    before = asyncio.all_tasks()
    await server.start()
    new = asyncio.all_tasks() - before
    return {t for t in new if getattr(t.get_coro(), "__name__", "") == "_server_main_loop"}


def _is_running(server: Any) -> bool:
    """Whether it accepts calls; the library shows that only to itself."""
    return bool(server._server.is_running())


def _be_quiet_about_callers() -> None:
    """gRPC logs a traceback for a header that is no UTF-8, and for a caller that has gone when its
    status is sent: a caller's doing that harms nobody, and the call's end has a line of its own.
    """
    logging.getLogger("grpc._cython.cygrpc").addFilter(_tells_more)
    logging.getLogger("asyncio").addFilter(_is_no_death)


def _tells_more(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(("Invalid encoding on", "ExecuteBatchError raised in"))


def _is_no_death(record: logging.LogRecord) -> bool:
    """What a server died of comes once more, out of a task of the library that nobody holds."""
    error = record.exc_info[1] if record.exc_info else None
    is_of_cython = "<coroutine without __name__>" in str(record.msg)
    return not (isinstance(error, UnicodeDecodeError) and is_of_cython)
