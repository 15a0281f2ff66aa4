"""Reports to a coordinator that this process's event loop does not turn, from a thread.

    thread   --turn?--> event loop, each _LOOK_S
             <--turned-    ordinary: nothing is sent
             (no turn for STALL_S): ReportStall to the coordinator, each _LOOK_S, until it turns

Messages and heartbeats come from the event loop. Python work of seconds on it (a large request is
parsed) makes the worker silent although it lives. A process that is stopped, a link that is cut and
C code that keeps the GIL silence the thread too. An engine that hangs is not vouched for.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import grpc

from engine.pb.diptych.internal.v1 import registry_pb2, registry_pb2_grpc
from engine.rpc.channel import CHANNEL_OPTIONS
from engine.rpc.liveness import STALL_S
from engine.rpc.trust import ClusterToken
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
_LOOK_S = 0.25
_CALL_S = 1.0
_JOIN_S = 2.0


class StallReporter:
    """One thread and one channel to one coordinator. Made on the event loop that it looks at."""

    def __init__(
        self,
        address: str,
        *,
        worker_id: str,
        incarnation: str,
        responsive: Callable[[], bool],
        token: ClusterToken | None = None,
    ) -> None:
        """`responsive`: whether the engine works; called on the thread."""
        self._address = address
        self._stall = registry_pb2.Stall(worker_id=worker_id, incarnation=incarnation)
        self._responsive = responsive
        self._metadata = token.metadata if token else ()
        self._loop = asyncio.get_running_loop()
        self._asked_s: float | None = None  # of the turn that is waited for, monotonic
        self._stopped = threading.Event()
        self._is_warned = False
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._thread = threading.Thread(target=self._run, name="stalls", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        try:
            self._thread.start()
        except RuntimeError as error:  # a limit of threads: silence is loss then
            _log.warning("stalls are not reported", coordinator=self._address, reason=str(error))

    async def stop(self) -> None:
        """End the thread; a call in flight is cancelled."""
        self._stopped.set()
        self._channel.close()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, _JOIN_S)

    def _run(self) -> None:
        call = registry_pb2_grpc.RegistryServiceStub(self._channel).ReportStall
        self._report(call, 0.0)  # connects, so that a stall does not have to
        while not self._stopped.wait(_LOOK_S):
            now_s, asked_s = time.monotonic(), self._asked_s
            if asked_s is None:
                self._asked_s = now_s
            try:  # each time: with one callback that is lost the thread would report for ever
                self._loop.call_soon_threadsafe(self._turned)
            except RuntimeError:  # the loop is closed
                return
            if asked_s is None:
                continue
            if now_s - asked_s >= STALL_S and self._responsive():
                self._report(call, now_s - asked_s)

    def _turned(self) -> None:
        self._asked_s = None

    def _report(self, call: Callable[..., object], lag_s: float) -> None:
        self._stall.lag_s = lag_s
        try:
            call(self._stall, timeout=_CALL_S, metadata=self._metadata)
        except (grpc.RpcError, ValueError) as error:  # ValueError: the channel is closed
            if not (self._stopped.is_set() or self._is_warned):
                self._is_warned = True  # once a registration
                reason = error.code().name if isinstance(error, grpc.Call) else str(error)
                _log.warning("a stall report failed", coordinator=self._address, reason=reason)
