"""The engine thread: the written contract between the asyncio loop and the engine.

    asyncio loop                      engine thread
    ------------                      -------------
    submit(request) -> Stream  -->    inbox (a queue of operations)   owns model, blocks, schedule
    stream.abort()             -->      |
    await call(operation)      -->      v
    load                       <--    a LoadReport a step
    Stream yields events       <--    one batch of events a step, by call_soon_threadsafe

- Values only. The engine thread applies what is in the inbox between two steps, in order of
  arrival, also when there is nothing to compute: clean-up never waits for new work. No other
  thread reads or writes a scheduler or a block pool.
- A Stream ends with a FinishedEvent, once, also after abort(): its reader sees every event that
  hands something over.
- If the engine thread dies, every stream ends with `EngineDied` and `died` is set: the process
  should exit. Where its self-test failed, `sick` is the reason. If it hangs, `responsive` is
  False, and the worker sends no sign of life for it any more.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any, TypeVar

from engine.base.errors import DiptychError, SelfTestFailed, Unavailable
from engine.scheduling.events import AnnouncedEvent, Event, FinishedEvent
from engine.scheduling.request import EngineRequest
from engine.step.core import EngineCore
from engine.step.operations import Abort, Add, Operation
from engine.telemetry.log import get_logger

_log = get_logger(__name__)
_T = TypeVar("_T")
_Message = Callable[[EngineCore], object]
CALL_TIMEOUT_S = 30.0
STUCK_S = 30.0  # messages and a step that take longer are taken for what will not end
_POLL_S = 0.02  # while requests wait for something that no message announces (an owner's deadline)


class EngineDied(Unavailable):
    """The engine thread is gone; the process is about to end."""


class Stream:
    """The events of one request, on the loop's side."""

    def __init__(self, key: int, engine: EngineThread, request: EngineRequest) -> None:
        self.key = key
        self.request = request
        self.undelivered: dict[int, tuple[AnnouncedEvent, float]] = {}  # by id: with when it came
        self._engine = engine
        self._queue: asyncio.Queue[Event | DiptychError] = asyncio.Queue()
        self.finished = False  # nothing is held any more

    def abort(self) -> None:
        """Ask for the end; the FinishedEvent still comes. No read may still write to its blocks."""
        self._engine.post(Abort(self.key))

    def push(self, event: Event | DiptychError) -> None:
        """On the loop: let the reader see this next; an error is raised there and ends nothing."""
        if isinstance(event, AnnouncedEvent):
            self.undelivered[id(event)] = event, time.monotonic()
        self._queue.put_nowait(event)

    def next_ready(self) -> Event | None:
        """The next event if one has gathered already."""
        return None if self._queue.empty() else self._take(self._queue.get_nowait())

    async def next(self) -> Event:
        """The next event. Raises EngineDied, or what `push` was given."""
        return self._take(await self._queue.get())

    async def next_within(self, timeout_s: float) -> Event | None:
        """The next event, or None if none comes in time. Raises as `next` does."""
        try:
            async with asyncio.timeout(timeout_s):
                return self._take(await self._queue.get())
        except TimeoutError:
            return None

    async def drain(self) -> list[Event]:
        """Events up to and including the FinishedEvent; nothing more if the engine died."""
        events: list[Event] = []
        while not self.finished:
            try:
                events.append(await self.next())
            except DiptychError:
                continue
        return events

    def _take(self, event: Event | DiptychError) -> Event:
        self.undelivered.pop(id(event), None)
        self.finished = self.finished or isinstance(event, FinishedEvent | EngineDied)
        if isinstance(event, DiptychError):
            raise event
        return event


class EngineThread:
    """Runs an EngineCore in its own thread and talks to one asyncio loop."""

    def __init__(self, core: EngineCore, loop: asyncio.AbstractEventLoop) -> None:
        self.core = core
        self.died = asyncio.Event()
        self.sick = ""  # how its self-test failed; set before `died`
        self._loop = loop
        self._keys = count(1)
        self.load = core.load()  # replaced by the engine thread after each step
        self._limits = core.scheduler.limits
        self._inbox: queue.SimpleQueue[_Message] = queue.SimpleQueue()
        self._streams: dict[int, Stream] = {}
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet()  # also of requests that ended
        self._stopping = False
        self._busy_since_s: float | None = None  # with messages and a step; None: it waits
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to step."""
        self._thread.start()

    async def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread after the step in progress."""
        self._stopping = True
        self._inbox.put(lambda core: None)
        await asyncio.to_thread(self._thread.join, timeout_s)

    @property
    def responsive(self) -> bool:
        """Whether the thread is not stuck in a message or a step."""
        since_s = self._busy_since_s
        return since_s is None or time.monotonic() - since_s < STUCK_S

    def post(self, operation: Operation[Any]) -> None:
        """Have `operation` applied on the engine thread; any thread may post.

        An exception of it ends the engine thread.
        """
        self._inbox.put(operation.apply)

    async def call(self, operation: Operation[_T]) -> _T:
        """Have `operation` applied and wait for its result.

        It is applied also when its caller has stopped waiting; then it is undone. Raises
        TimeoutError, EngineDied, and what the operation raises.
        """
        if self.died.is_set():
            raise EngineDied("the engine stopped")
        future: asyncio.Future[_T] = self._loop.create_future()

        def fail(error: Exception) -> None:
            if not future.done():
                future.set_exception(error)

        def succeed(result: _T) -> None:
            if not future.done():
                future.set_result(result)
            else:
                self._inbox.put(lambda core: operation.undo(core, result))

        def run(core: EngineCore) -> None:
            try:
                result = operation.apply(core)
            except Exception as error:
                failed = error
                self._to_loop(lambda: fail(failed))
            else:
                self._to_loop(lambda: succeed(result))

        self._inbox.put(run)
        return await asyncio.wait_for(future, CALL_TIMEOUT_S)

    def submit(self, request: EngineRequest) -> Stream:
        """Queue a request, on the loop. Raises EngineDied, InvalidRequest if it can never fit."""
        if self.died.is_set():
            raise EngineDied("the engine stopped")
        self._limits.check_fits(request)
        stream = Stream(next(self._keys), self, request)
        self.streams.add(stream)
        self._streams[stream.key] = stream
        self.post(Add(stream.key, request))
        return stream

    # -- the engine thread -------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._busy_since_s = time.monotonic()
                self._take_messages()
                busy = self.core.step()
                self.load = self.core.load()
                self._publish(self.core.take_events())
                self._busy_since_s = None
                if not busy:
                    self._wait()
        except SelfTestFailed as error:
            self.sick = error.message
            _log.error("engine is sick", reason=error.message)
        except BaseException:
            _log.exception("engine thread died")
        finally:
            self._busy_since_s = None
            self._to_loop(self._bury)

    def _take_messages(self) -> None:
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            message(self.core)

    def _wait(self) -> None:
        """Sleep until a message comes; requests that wait are looked at again after a moment."""
        try:
            message = self._inbox.get(timeout=None if self.core.idle else _POLL_S)
        except queue.Empty:
            return
        self._busy_since_s = time.monotonic()
        message(self.core)

    def _publish(self, events: list[Event]) -> None:
        if events:
            self._to_loop(lambda: self._dispatch(events))

    def _to_loop(self, call: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop is closed: no reader is left
            self._stopping = True

    # -- the loop ----------------------------------------------------------------------------------

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            stream = self._streams[event.key]
            if isinstance(event, FinishedEvent):
                del self._streams[event.key]
            stream.push(event)

    def _bury(self) -> None:
        self.died.set()
        for stream in self._streams.values():
            stream.push(EngineDied("the engine stopped"))
        self._streams.clear()
