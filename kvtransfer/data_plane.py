"""The data plane as other threads use it: commands in, futures out.

    engine thread / asyncio loop              data-plane thread                 transport
       pull(), connect() ...  --commands-->   PullLoop: step every pull  -->    post, poll
                              <--futures---   in flight, fence, settle

Only the data-plane thread touches the transport. Other threads put commands into a queue and hold
futures. The idle thread sleeps in that queue. Futures complete on the data-plane thread, so their
callbacks must be short (`loop.call_soon_threadsafe`, or `asyncio.wrap_future`).

    serving --reads that do not end reach a bound (`quarantine`)--> restarting --> serving
       |                                                               |
       +-- a bug ---------------> died <-- the transport does not end -+

A process whose data plane died should end: only that frees the memory of its reads.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

from engine.base.holds import Hold
from engine.base.kv_layout import GENERATION_BYTES, LayerGroup
from engine.base.types import KVLink
from kvtransfer.connections import Connections
from kvtransfer.fence import Fence
from kvtransfer.links import LinkMeter
from kvtransfer.plan import coalesce, pieces
from kvtransfer.pull import LocalMemory, Pull, PullRequest
from kvtransfer.pull_loop import PullLoop
from kvtransfer.quarantine import Quarantine
from kvtransfer.transfer_counters import TransferCounters
from kvtransfer.transport import (
    MemoryRegion,
    PullFailed,
    Region,
    RemotePool,
    Transport,
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class DataPlane:
    """Owner of the data-plane thread, and through it of the transport and every read in flight.

    Attributes:
        died: why the thread ended without `stop`; the process should end, too.
    """

    def __init__(
        self,
        transport_factory: Callable[[str], Transport],
        *,
        incarnation: str,
        blocks: MemoryRegion,
        generations: MemoryRegion,
        num_blocks: int,
        block_bytes: int,
        groups: tuple[LayerGroup, ...] = (),
        fence: Fence | None = None,
        quarantine: Quarantine | None = None,
        on_restart: Callable[[], None] = lambda: None,
        machine: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ValueError for memory that is too small.

        Args:
            transport_factory: makes a transport for an agent's name.
            blocks: the local pool, num_blocks items of block_bytes; it must outlive `stop`.
            generations: num_blocks unsigned 64-bit integers in DRAM, likewise.
            groups: what a block holds; by default one head of all its bytes.
            on_restart: called on the data-plane thread.
            machine: equal for all workers of one machine.
        """
        _check_memory(blocks, generations, num_blocks, block_bytes)
        groups = groups or (LayerGroup(0, 1, block_bytes, 0),)
        self.incarnation = incarnation
        self._blocks = Region("blocks", 0, "", block_bytes, blocks, groups)
        self._generations = Region("generations", 0, "", GENERATION_BYTES, generations)
        self._num_blocks = num_blocks
        self._machine = machine
        self._meter = LinkMeter(machine, self._lane)
        self._clock = clock
        memory = LocalMemory.of(blocks, num_blocks, block_bytes)
        regions = [blocks, generations, memory.landing]
        self._connections = Connections(transport_factory, incarnation, regions, memory)
        self._loop = PullLoop(
            self._connections,
            memory,
            fence or Fence(),
            quarantine or Quarantine(),
            self._meter,
            on_restart,
            clock,
        )
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # orders the last command before the end of the thread
        self._ended = False
        self._started: Future[None] = Future()
        self.died: Future[str] = Future()
        self.died.set_running_or_notify_cancel()
        self._thread = threading.Thread(target=self._run, name="kv-data-plane", daemon=True)

    def start(self, timeout_s: float = 60.0) -> None:
        """Start the thread and register memory; raises what the transport raised."""
        self._thread.start()
        self._started.result(timeout_s)

    @property
    def counters(self) -> TransferCounters:
        """Totals since the start, at one moment."""
        return self._loop.counters

    @property
    def agent(self) -> str:
        """Name of the agent of this moment; after `start`."""
        return self._connections.agent.name

    @property
    def local_pool(self) -> RemotePool:
        """This worker's pool as peers reach it now; after `start`."""
        agent = self._connections.agent
        local = (self._blocks, self._generations)
        regions = tuple(replace(region, agent=agent.name) for region in local)
        return RemotePool(self.incarnation, self._num_blocks, regions, (agent,), self._machine)

    def links(self) -> dict[str, KVLink]:
        """What reads from each peer have shown, by incarnation."""
        return self._meter.links()

    def _lane(self, pool: RemotePool, same_machine: bool) -> str:
        transport = self._connections.transport
        if transport is None:
            return ""
        return transport.lane(pool.memory_kind, same_machine=same_machine)

    def connect(self, pool: RemotePool) -> Future[None]:
        """Make a peer's pool readable; repeating it is harmless. PeerLost, PullFailed."""
        return self._command(lambda future: self._loop.connect(pool, future))

    def disconnect(self, incarnation: str) -> Future[None]:
        """Take no more pulls from a peer; completes when its last read is over."""
        return self._command(lambda future: self._loop.disconnect(incarnation, future))

    def holds(self) -> Future[list[Hold]]:
        """What every pull keeps at the moment, failed ones included."""
        return self._command(lambda future: future.set_result(self._loop.holds()))

    def pull(
        self,
        pool: RemotePool,
        remote_ids: Sequence[int],
        local_ids: Sequence[int],
        expected_generations: Sequence[int],
        timeout_s: float,
        request_id: str = "",
    ) -> Pull:
        """Read remote_ids[i] of a connected pool into local_ids[i] and fence it; see `Pull`.

        `request_id` appears in logs and holds. Raises ValueError at once for ids out of bounds, a
        local id given twice, lists of unequal length, and a peer that lacks some of our heads.
        """
        if len(expected_generations) != len(remote_ids):
            raise ValueError(
                f"{len(expected_generations)} generations for {len(remote_ids)} blocks"
            )
        runs = coalesce(
            remote_ids,
            local_ids,
            num_remote_blocks=pool.num_blocks,
            num_local_blocks=self._num_blocks,
        )
        now = self._clock()
        request = PullRequest(
            pool=pool,
            local_ids=tuple(local_ids),
            expected=tuple(expected_generations),
            runs=runs,
            pieces=tuple(pieces(pool.blocks, self._blocks)),
            asked_at=now,
            deadline=now + timeout_s,
            request_id=request_id,
        )
        pull = Pull(request.local_ids, lambda: self._submit(lambda: self._loop.cancel(pull)))
        self._submit(lambda: self._loop.begin(pull, request))
        return pull

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Fail all pulls, wait for their reads, end the thread; whether everything settled in time.

        If not, a read may still write local memory: the transport is left open and the process
        should end without freeing the pool.
        """
        if not self._thread.ident:
            return True
        self._submit(lambda: self._loop.begin_stop(timeout_s))
        self._thread.join(timeout_s + 1.0)
        return not self._thread.is_alive() and self._connections.transport is None

    def _command(self, run: Callable[[Future[_T]], None]) -> Future[_T]:
        future: Future[_T] = Future()
        future.set_running_or_notify_cancel()
        self._submit(lambda: run(future))
        return future

    def _submit(self, command: Callable[[], None]) -> None:
        with self._lock:
            if not self._ended:
                self._commands.put(command)
                return
        command()  # the thread has ended, and the loop refuses every command

    # -- data-plane thread -------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._connections.open()
        except BaseException as error:
            self._end()
            self._started.set_exception(error)
            return
        self._started.set_result(None)
        try:
            self._loop.serve(self._take_commands)
        except BaseException as error:
            _log.exception("data plane died")
            self._loop.fail_all(PullFailed("the data plane died"))
            self.died.set_result(str(error) or repr(error))
        finally:
            self._end()

    def _take_commands(self, delay: float | None) -> None:
        """Run what has gathered; wait up to `delay` seconds for a first one, None: for ever."""
        try:
            command = self._commands.get() if delay is None else self._commands.get(timeout=delay)
            while True:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _end(self) -> None:
        """Close the transport unless a read still holds memory, then refuse late commands."""
        try:
            self._loop.end(keep_transport=self.died.done())
        finally:
            with self._lock:
                self._ended = True
            self._take_commands(0.0)


def _check_memory(
    blocks: MemoryRegion, generations: MemoryRegion, num_blocks: int, block_bytes: int
) -> None:
    if blocks.num_bytes < num_blocks * block_bytes:
        raise ValueError(
            f"{blocks.num_bytes} bytes do not hold {num_blocks} blocks of {block_bytes}"
        )
    size = num_blocks * GENERATION_BYTES
    if generations.num_bytes < size or generations.address % GENERATION_BYTES:
        raise ValueError(f"generations: expected {num_blocks} aligned 64-bit integers")
