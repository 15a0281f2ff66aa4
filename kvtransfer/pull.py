"""One pull as a state machine, stepped on the data-plane thread; nobody else touches it.

    reading --last data read DONE--> fencing --generations DONE--> finished
       |                                |                          (done: result; settled)
       +-- error, timeout, cancel ------+
                     v
                  failed  --no read left, or the transport ended; and quiet--> settled
                  (done: error)

A transport that ends takes all reads with it: a failed pull is then settled, any other begins anew
on the next one (`restart`).

Data is read in slices, a few in flight, so that several pulls share the thread fairly and a timeout
or a cancel stops a long pull soon. The generations are read only after every data read is terminal,
never with them (see `fence`). The landing word of a block is that of its *local* id: a local block
has one writer at a time, its pull, and so has its word.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtransfer.fence import Fence
from kvtransfer.plan import Run, extents, slices
from kvtransfer.transport import (
    GENERATION_BYTES,
    Extent,
    MemoryRegion,
    PeerHandle,
    PullFailed,
    PullTimeout,
    ReadHandle,
    ReadState,
    RemotePool,
    TransferError,
    Transport,
)

SLICE_BYTES = 8 << 20  # of one transfer request; over CMA posting it takes about 1 ms
MAX_SLICES_IN_FLIGHT = 4  # of one pull
# After an error NIXL 1.5.1 may call a request terminal while others of its batch are still being
# cancelled, and a GPU may still copy for a transport that has ended; their destination is not
# handed back before that is surely over.
QUIET_S = 1.0


@dataclass(frozen=True, slots=True)
class PullResult:
    """A pull whose reads all ended well. Blocks at the indices `stale` must be dropped."""

    stale: tuple[int, ...]  # indices into the ids that were asked for
    num_blocks: int
    num_bytes: int
    num_extents: int  # contiguous reads after coalescing
    seconds: float  # from the first post to the comparison


class Pull:
    """What the caller of a pull holds.

    `done`: PullResult, or PeerLost, PullTimeout, PullFailed. `settled`: None, once no read of this
    pull can still write local memory; only then may the destination blocks be freed. Never before
    `done`; long after it when a peer hangs. Neither can be cancelled as a future. `block_ids` are
    the destination.
    """

    __slots__ = ("_cancel", "block_ids", "done", "settled")

    def __init__(self, block_ids: tuple[int, ...], cancel: Callable[[], None]) -> None:
        self.block_ids = block_ids
        self.done: Future[PullResult] = Future()
        self.settled: Future[None] = Future()
        self.done.set_running_or_notify_cancel()
        self.settled.set_running_or_notify_cancel()
        self._cancel = cancel

    def cancel(self) -> None:
        """Stop early: `done` fails with PullFailed unless it has ended; `settled` comes later."""
        self._cancel()

    def refuse(self, error: TransferError) -> None:
        """Fail a pull of which nothing was posted."""
        self.done.set_exception(error)
        self.settled.set_result(None)


@dataclass(frozen=True, slots=True)
class PullRequest:
    """A checked and planned pull. Times are on the data plane's clock."""

    pool: RemotePool
    local_ids: tuple[int, ...]
    expected: tuple[int, ...]
    runs: list[Run]
    asked_at: float
    deadline: float
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class PullHold:
    """What one pull keeps from being reused, at one moment."""

    request_id: str
    peer: str  # incarnation
    block_ids: tuple[int, ...]
    age_s: float  # since it was asked for
    left_s: float  # until it fails, or a failed one ends the transport; below 0: any moment now
    error: str  # why it failed; "" while it is under way


@dataclass(frozen=True, slots=True)
class LocalMemory:
    """Where reads land."""

    blocks: MemoryRegion
    landing: MemoryRegion
    landed: npt.NDArray[np.uint64]  # [num_blocks], the landing region as numbers


class Reading:
    """The state of one pull in flight."""

    def __init__(
        self, pull: Pull, request: PullRequest, peer: PeerHandle, memory: LocalMemory, fence: Fence
    ) -> None:
        self.pull = pull
        self.request = request
        self.error: TransferError | None = None
        self.result: PullResult | None = None
        self._peer = peer
        self._memory = memory
        self._fence = fence
        self._block_bytes = request.pool.block_bytes
        self._slices: deque[list[Run]] = deque()
        self._handles: list[ReadHandle] = []
        self._fencing = False
        self.restart(peer)
        self._began_at: float | None = None
        self._quiet_at = 0.0
        self.failed_at = math.inf  # when that was first seen with reads still under way

    @property
    def has_reads(self) -> bool:
        """Whether the transport still holds a read of this pull."""
        return bool(self._handles)

    @property
    def num_unsettled_blocks(self) -> int:
        """Blocks that a failed pull keeps from being reused."""
        return len(self.request.local_ids) if self.error else 0

    @property
    def is_open(self) -> bool:
        """Whether its caller still waits for it."""
        return self.error is None and self.result is None

    def restart(self, peer: PeerHandle) -> None:
        """Begin anew over a connection of another transport; what was read so far has ended."""
        self._peer = peer
        block_bytes = self._block_bytes
        self._slices = deque(slices(self.request.runs, max(1, SLICE_BYTES // block_bytes)))
        self._handles = []
        self._fencing = False

    def abandon(self, now: float) -> None:
        """The transport has ended, and with it what a failed pull still had in flight."""
        if self._handles and self.error is not None:
            self._handles = []
            self._quiet_at = now + QUIET_S

    def hold(self, now: float, quarantine_s: float) -> PullHold:
        """What it keeps from being reused; a failed one is waited for `quarantine_s` at most."""
        failed_at = min(self.failed_at, now)
        ends_at = failed_at + quarantine_s if self.error else self.request.deadline
        return PullHold(
            request_id=self.request.request_id,
            peer=self.request.pool.incarnation,
            block_ids=self.request.local_ids,
            age_s=now - self.request.asked_at,
            left_s=ends_at - now,
            error=str(self.error or ""),
        )

    def fail(self, error: TransferError) -> None:
        """Answer the caller now; reads in flight go on until they are terminal."""
        if self.is_open:
            self.error = error
            self._slices.clear()
            self.pull.done.set_exception(error)

    def step(self, transport: Transport, now: float) -> bool:
        """Poll what is in flight, post what may be posted; whether anything moved."""
        moved = self._poll(transport, now)
        if self.error is None and now >= self.request.deadline:
            waited = now - self.request.asked_at
            self.fail(
                PullTimeout(f"peer {self.request.pool.incarnation}: no end after {waited:.1f} s")
            )
        if self.is_open:
            moved |= self._advance(transport, now)
        return moved

    def settle(self, now: float) -> bool:
        """Complete `settled` if nothing can land any more; whether the pull is over."""
        if self.error is not None:
            self.failed_at = min(self.failed_at, now)
        if self._handles or self.is_open or now < self._quiet_at:
            return False
        self.pull.settled.set_result(None)
        return True

    def _poll(self, transport: Transport, now: float) -> bool:
        pending: list[ReadHandle] = []
        failure: TransferError | None = None
        for handle in self._handles:
            try:
                if transport.poll(handle) is ReadState.PENDING:
                    pending.append(handle)
                    continue
            except TransferError as error:
                failure = failure or error
            except Exception as error:  # a bug; the read is over for us all the same
                failure = failure or PullFailed(f"poll raised {error!r}")
            transport.release(handle)
        moved = len(pending) < len(self._handles)
        self._handles = pending
        if failure:
            self._quiet_at = now + QUIET_S
            self.fail(failure)
        return moved

    def _advance(self, transport: Transport, now: float) -> bool:
        """Post one more slice, or the fence, or finish."""
        if self._slices:
            if len(self._handles) >= MAX_SLICES_IN_FLIGHT:
                return False
            reads = extents(self._slices.popleft(), self._block_bytes)
            self._post(transport, now, self.request.pool.blocks, self._memory.blocks, reads)
            return True
        if self._handles:
            return False
        if not self._fencing:
            self._fencing = True
            reads = extents(self.request.runs, GENERATION_BYTES)
            self._post(transport, now, self.request.pool.generations, self._memory.landing, reads)
            return True
        self._finish(now)
        return True

    def _post(
        self,
        transport: Transport,
        now: float,
        remote: MemoryRegion,
        local: MemoryRegion,
        reads: list[Extent],
    ) -> None:
        if self._began_at is None:
            self._began_at = now
        try:
            self._handles.append(transport.post_read(self._peer, remote, local, reads))
        except TransferError as error:
            self._quiet_at = now + QUIET_S
            self.fail(error)

    def _finish(self, now: float) -> None:
        request = self.request
        actual: list[Any] = self._memory.landed[list(request.local_ids)].tolist()
        num_blocks = len(request.local_ids)
        self.result = PullResult(
            stale=self._fence.stale(request.expected, actual),
            num_blocks=num_blocks,
            num_bytes=num_blocks * self._block_bytes,
            num_extents=len(request.runs),
            seconds=now - (self._began_at or now),
        )
        self.pull.done.set_result(self.result)

    def crash(self, error: Exception, now: float) -> None:
        """An unexpected exception in a step: nobody may wait for it for ever."""
        self._quiet_at = now + QUIET_S
        self.fail(PullFailed(f"peer {self.request.pool.incarnation}: {error!r}"))
