"""Which calls a worker takes, and its orderly end.

    SIGTERM, or Drain from a coordinator
      -> not ready any more: /health/ready, grpc.health, the table of workers; new calls are refused
      -> the calls inside finish, for at most --drain-s
      -> those that are left end as UNAVAILABLE: their callers continue them elsewhere
      -> exit 0          a second signal skips the wait (exit 130 after Ctrl-C)

Owned by the asyncio loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator

from engine.base.errors import Unavailable
from engine.scheduling.request import EngineRequest
from engine.step.engine_thread import EngineThread, Stream
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
_LAST_STATUS_S = 5.0  # for the statuses of calls that were handed over


class Calls:
    """The calls of Prefill and Decode that are inside, each with its stream of events."""

    def __init__(self, engine: EngineThread) -> None:
        self._engine = engine
        self._inside: set[Stream] = set()
        self._idle = asyncio.Event()  # set while none is inside
        self._idle.set()
        self.draining = False

    def check_takes(self, request: EngineRequest) -> None:
        """Raise Unavailable while draining, and without a budget for this kind of request."""
        if self.draining:
            raise Unavailable("this worker is draining")
        budgets = self._engine.load.role_budgets
        if request.sampling is None and not budgets.prompt_tokens:
            raise Unavailable("this worker computes no prompts for others: its budget is 0 tokens")
        if request.sampling is not None and not budgets.answers:
            raise Unavailable("this worker writes no answers: its budget is 0 answers")

    @contextlib.contextmanager
    def serving(self, request: EngineRequest) -> Iterator[Stream]:
        """Submit a call's request; the call counts as inside until the block is left.

        Raises as `check_takes` and `EngineThread.submit` do.
        """
        self.check_takes(request)
        stream = self._engine.submit(request)
        self._inside.add(stream)
        self._idle.clear()
        try:
            yield stream
        finally:
            self._inside.discard(stream)
            if not self._inside:
                self._idle.set()

    async def drain(self, deadline_s: float, hurry: asyncio.Event) -> None:
        """Take no new call and wait for those inside, until the deadline or `hurry`.

        Then hand over what is left. Returns when none is inside, or their ends take too long.
        """
        self.draining = True
        _log.info("draining", num_calls=len(self._inside), deadline_s=deadline_s)
        waits = [asyncio.create_task(event.wait()) for event in (self._idle, hurry)]
        try:
            await asyncio.wait(waits, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if self._inside:
            _log.warning("handing over", num_calls=len(self._inside))
        for stream in self._inside:
            stream.push(Unavailable("this worker ends; the request goes on elsewhere"))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), _LAST_STATUS_S)


class Orders:
    """Why and how this process ends: the first order holds."""

    def __init__(self, drain_s: float) -> None:
        self.drain_s = drain_s
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.interrupted = False  # by Ctrl-C: a person waits at a terminal

    def signalled(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Handle a signal: drain; the second one: do not wait."""
        self.interrupted = self.interrupted or number == signal.SIGINT
        (self.hurry if self.stop.is_set() else self.stop).set()

    @property
    def exit_status(self) -> int:
        """Exit status of an end that was ordered: 130 where Ctrl-C cut it short."""
        return 130 if self.interrupted and self.hurry.is_set() else 0

    def drain(self, deadline_s: float) -> None:
        """Handle a coordinator's Drain, within so many seconds; 0: within --drain-s."""
        if not self.stop.is_set():
            self.drain_s = deadline_s or self.drain_s
            self.stop.set()
