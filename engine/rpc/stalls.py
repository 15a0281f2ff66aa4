"""Reports stalls of this process's event loop to a coordinator, from a thread.

    thread   --callback--> event loop, every _POLL_S
             <--ran-------    normal: nothing is sent
             (not run for STALL_S): ReportStall to the coordinator every _POLL_S, until it runs

The event loop sends messages and heartbeats. Seconds of Python work on it, such as parsing a large
request, make the worker silent although it is alive. A stopped process, a cut link and C code that
holds the GIL silence the thread too. While the engine hangs, no stall is reported.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import grpc

from engine.pb.diptych.internal.v1 import registry_pb2, registry_pb2_grpc
from engine.rpc.auth import ClusterToken
from engine.rpc.channel import CHANNEL_OPTIONS
from engine.rpc.liveness import STALL_S
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
_POLL_S = 0.25
_CALL_S = 1.0
_JOIN_S = 2.0


class StallReporter:
    """One thread and one channel to one coordinator. Create it on the observed event loop."""

    def __init__(
        self,
        address: str,
        stall: registry_pb2.Stall,
        responsive: Callable[[], bool],
        token: ClusterToken | None,
    ) -> None:
        """`responsive`: whether the engine makes progress; called on the thread."""
        self._address = address
        self._stall = stall
        self._responsive = responsive
        self._metadata = token.metadata if token else ()
        self._loop = asyncio.get_running_loop()
        self._asked_s: float | None = None  # monotonic time of the oldest pending callback
        self._stopped = threading.Event()
        self._is_warned = False
        self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._thread = threading.Thread(target=self._run, name="stalls", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        try:
            self._thread.start()
        except RuntimeError as error:  # thread limit: stalls then count as loss
            _log.warning("stalls are not reported", coordinator=self._address, reason=str(error))

    async def stop(self) -> None:
        """End the thread; a call in flight is cancelled."""
        self._stopped.set()
        self._channel.close()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, _JOIN_S)

    def _run(self) -> None:
        call = registry_pb2_grpc.RegistryServiceStub(self._channel).ReportStall
        self._report(call, 0.0)  # connects before the first stall
        while not self._stopped.wait(_POLL_S):
            now_s, asked_s = time.monotonic(), self._asked_s
            if asked_s is None:
                self._asked_s = now_s
            try:  # each time, as a lost callback would make the thread report for ever
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
