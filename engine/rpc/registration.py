"""Registers a worker with all coordinators: one Register stream each.

addresses (HOST:PORT, or a name with many addresses) --re-resolved--> one task a coordinator

task   dial -> Hello -> Welcome -> Load, Load, ...     a broken stream is dialled again
                          and a thread that reports stalls (stalls.py)
                     -> Drain, Forget, RoleBudgets: passed to callbacks
                     -> Refused, or a wrong token: sets `refused`; the process ends, because
                        a retry would not help
stop   a last Load, then the end of the stream: coordinators see an orderly end
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import grpc

from engine.base.errors import UnknownMethod
from engine.base.types import RoleBudgets
from engine.pb.diptych.internal.v1 import registry_pb2, registry_pb2_grpc
from engine.rpc.auth import ClusterToken
from engine.rpc.channel import open_channel
from engine.rpc.convert import from_pb
from engine.rpc.stalls import StallReporter
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
_RESOLVE_S = 10.0
_RETRY_S = 0.5
WARN_S = 10.0  # between two log lines about an unreachable coordinator
_WELCOME_S = 10.0
_TOKEN_REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_GOODBYE_S = 1.0


@dataclass(slots=True)
class _Outage:
    """An unreachable coordinator; times of the loop's clock."""

    began_s: float
    warn_s: float  # when the next log line is due


@dataclass(kw_only=True, eq=False)
class Registration:
    """Keeps this worker registered with all coordinators until `stop`."""

    coordinators: str  # HOST:PORT[,HOST:PORT...]
    hello: registry_pb2.Hello
    load: Callable[[], registry_pb2.Load | None]
    on_drain: Callable[[float], None]
    on_forget: Callable[[str], None] = lambda incarnation: None
    on_role_budgets: Callable[[RoleBudgets], None] = lambda budgets: None
    responsive: Callable[[], bool] = lambda: True
    token: ClusterToken | None = None
    refused: asyncio.Future[str] = field(default_factory=asyncio.Future)
    _stopping: bool = False
    _streams: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    _changed: dict[str, asyncio.Event] = field(default_factory=dict)
    _accepted: set[str] = field(default_factory=set)
    _outages: dict[str, _Outage] = field(default_factory=dict)
    _resolver: asyncio.Task[None] | None = None

    @property
    def registered(self) -> bool:
        """Whether this worker is registered with a coordinator now."""
        return bool(self._accepted)

    def start(self) -> None:
        """Begin to dial."""
        self._resolver = asyncio.create_task(self._follow_targets())

    def report_now(self) -> None:
        """Send a Load now, without waiting for the next heartbeat."""
        for event in self._changed.values():
            event.set()

    async def stop(self) -> None:
        """Send a last Load on each stream and end it."""
        self._stopping = True
        self.report_now()
        tasks = [*self._streams.values(), *([self._resolver] if self._resolver else [])]
        if registered := [self._streams[a] for a in self._accepted if a in self._streams]:
            await asyncio.wait(registered, timeout=_GOODBYE_S)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow_targets(self) -> None:
        targets = [t.strip() for t in self.coordinators.split(",") if t.strip()]
        while True:
            found = set()
            for target in targets:
                found |= await _resolve(target)
            for address in found - self._streams.keys():
                self._streams[address] = asyncio.create_task(self._keep(address))
            for address in self._streams.keys() - found if found else ():
                if address not in self._accepted:
                    self._streams.pop(address).cancel()
            await asyncio.sleep(_RESOLVE_S)

    async def _keep(self, address: str) -> None:
        """Stay registered with one coordinator."""
        channel = open_channel(address, token=self.token)
        try:
            while not self.refused.done() and not self._stopping:
                try:
                    await self._register(address, channel)
                except (grpc.RpcError, TimeoutError) as error:
                    if isinstance(error, grpc.aio.AioRpcError) and error.code() in _TOKEN_REFUSED:
                        self._refuse(address, error.details() or error.code().name)
                    elif address in self._accepted:
                        _log.warning("coordinator lost", coordinator=address, reason=_reason(error))
                    else:
                        self._not_reached(address, _reason(error))
                except asyncio.CancelledError:  # gRPC cancels the call if its writer raises
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise
                    _log.error("coordinator lost: the call was cancelled", coordinator=address)
                except Exception:
                    _log.exception("coordinator lost", coordinator=address)
                finally:
                    self._accepted.discard(address)
                    self._changed.pop(address, None)
                if not self._stopping:
                    await asyncio.sleep(_RETRY_S)
        finally:
            await channel.close()

    def _not_reached(self, address: str, reason: str) -> None:
        """Log that a coordinator is unreachable: at once, then every `WARN_S`."""
        now_s = asyncio.get_running_loop().time()
        outage = self._outages.setdefault(address, _Outage(now_s, now_s))
        if now_s >= outage.warn_s:
            outage.warn_s = now_s + WARN_S
            _log.warning(
                "coordinator cannot be reached",
                coordinator=address,
                reason=reason,
                for_s=round(now_s - outage.began_s),
            )

    def _refuse(self, address: str, reason: str) -> None:
        if not self.refused.done():
            self.refused.set_result(f"{address}: {reason}")

    async def _register(self, address: str, channel: grpc.aio.Channel) -> None:
        changed = self._changed[address] = asyncio.Event()
        welcomed: asyncio.Future[float] = asyncio.get_running_loop().create_future()

        async def messages() -> AsyncIterator[registry_pb2.WorkerMessage]:
            yield registry_pb2.WorkerMessage(hello=self.hello)
            heartbeat_s = await welcomed
            while True:
                changed.clear()
                try:
                    load = self.load()
                except Exception:  # gRPC ends the call without logging the reason
                    _log.exception("no load to report", coordinator=address)
                    raise
                if load:  # a worker whose engine hangs is silent
                    yield registry_pb2.WorkerMessage(load=load)
                if self._stopping:
                    return
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), heartbeat_s)

        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        call = stub.Register(messages())
        stalls: StallReporter | None = None
        try:
            async with asyncio.timeout(_WELCOME_S):
                response = await call.read()
            while response is not grpc.aio.EOF:
                if response.HasField("refused"):
                    self._refuse(address, response.refused.reason)
                    return
                if response.HasField("welcome") and not welcomed.done():
                    self._accepted.add(address)
                    self._outages.pop(address, None)
                    welcomed.set_result(response.welcome.heartbeat_s)
                    stall = registry_pb2.Stall(
                        worker_id=self.hello.worker_id, incarnation=self.hello.incarnation
                    )
                    stalls = StallReporter(address, stall, self.responsive, self.token)
                    stalls.start()
                    _log.info("registered", coordinator=address)
                if response.HasField("drain"):
                    _log.info("drain requested", coordinator=address)
                    self.on_drain(response.drain.deadline_s)
                if response.HasField("forget"):
                    self.on_forget(response.forget.incarnation)
                if response.HasField("role_budgets"):
                    self.on_role_budgets(from_pb(RoleBudgets, response.role_budgets))
                response = await call.read()
        finally:
            call.cancel()
            welcomed.cancel()
            if stalls is not None:
                await stalls.stop()


async def _resolve(target: str) -> set[str]:
    """HOST:PORT for each address of HOST; empty while the name does not resolve."""
    host, _, port = target.rpartition(":")
    try:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        _log.warning("coordinator's name does not resolve", coordinator=target, reason=str(error))
        return set()
    hosts = {str(where[0]) for *_, where in found}
    if len(hosts) > 1 and host == "localhost":
        return {target}
    return {f"[{h}]:{port}" if ":" in h else f"{h}:{port}" for h in hosts}


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return UnknownMethod(error.details() or "unknown method").message
        return f"{error.code().name}: {error.details()}"
    if isinstance(error, TimeoutError):
        return f"no response within {_WELCOME_S:g} s"
    return type(error).__name__
