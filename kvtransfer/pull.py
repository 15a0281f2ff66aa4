"""One pull as a state machine, used on the data-plane thread alone.

    reading --last data read DONE--> fencing --generations DONE--> finished
       |                                |                          (done: result; settled)
       +-- error, timeout, cancel ------+
                     v
                  failed  --no read pending, or the transport ended; and quiet--> settled
                  (done: error)

The end of a transport ends all its reads: a failed pull is then settled, any other begins anew on
the next transport (`restart`).

Data is read in slices, a few in flight, so that several pulls share the thread fairly and a timeout
or a cancel stops a long pull soon. A slice is one read a remote rank that holds a part of its
blocks. The generations are read only after every data read is terminal, never with them (see
`fence`). The generation of a block lands at its *local* id: one pull at a time writes a local
block, and so its generation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.base.holds import Hold
from engine.base.kv_layout import GENERATION_BYTES
from kvtransfer.fence import Fence
from kvtransfer.plan import Piece, Run, extents, slices
from kvtransfer.transport import (
    Extent,
    MemoryRegion,
    PeerHandle,
    PullFailed,
    PullTimeout,
    ReadHandle,
    ReadState,
    Region,
    RemotePool,
    TransferError,
    Transport,
)

SLICE_BYTES = 8 << 20  # of one transfer request; over CMA posting it takes about 1 ms
MAX_SLICES_IN_FLIGHT = 4  # of one pull
# After an error NIXL 1.5.1 may call a request terminal while others of its batch are still being
# cancelled, and a GPU may still copy for a transport that has ended. Their destination is handed
# back only after this time.
QUIET_S = 1.0


@dataclass(frozen=True, slots=True)
class PullResult:
    """A pull whose reads all ended well. Blocks at the indices `stale` must be dropped."""

    stale: tuple[int, ...]  # indices into the ids of the request
    num_blocks: int
    num_bytes: int
    num_extents: int  # contiguous reads after coalescing
    seconds: float  # from the first post to the comparison

    @property
    def num_stale_blocks(self) -> int:
        """How many must be dropped."""
        return len(self.stale)


class Pull:
    """A pull as its caller sees it. Neither future can be cancelled.

    Attributes:
        block_ids: the destination.
        done: PullResult, or PeerLost, PullTimeout, PullFailed.
        settled: None, once no read of this pull can still write local memory; only then may the
            destination be freed. Never before `done`; long after it when a peer hangs.
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
    pieces: tuple[Piece, ...]  # of each block
    asked_at: float
    deadline: float
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class LocalMemory:
    """Where reads land."""

    blocks: MemoryRegion
    block_bytes: int
    landing: MemoryRegion
    landed: npt.NDArray[np.uint64]  # [num_blocks], the landing region as numbers

    @classmethod
    def of(cls, blocks: MemoryRegion, num_blocks: int, block_bytes: int) -> LocalMemory:
        """These blocks, and memory for the generations of so many."""
        landed = np.zeros(num_blocks, dtype=np.uint64)
        landing = MemoryRegion(landed.ctypes.data, landed.nbytes)
        return cls(blocks, block_bytes, landing, landed)


@dataclass(frozen=True, slots=True)
class _Read:
    """One transfer request to be posted: some pieces of some blocks of a remote region."""

    remote: Region
    local: MemoryRegion
    runs: list[Run]
    pieces: list[Piece]

    def extents(self, local_stride: int) -> list[Extent]:
        strides = {"remote_stride": self.remote.stride, "local_stride": local_stride}
        return [e for piece in self.pieces for e in extents(self.runs, piece, **strides)]


class Reading:
    """The state of one pull in flight."""

    def __init__(
        self,
        pull: Pull,
        request: PullRequest,
        peers: Mapping[str, PeerHandle],
        memory: LocalMemory,
        fence: Fence,
    ) -> None:
        self.pull = pull
        self.request = request
        self.error: TransferError | None = None
        self.result: PullResult | None = None
        self._memory = memory
        self._fence = fence
        self._piece_bytes = sum(piece.num_bytes for piece in request.pieces)  # of one block
        self._reads: deque[_Read] = deque()
        self._handles: list[ReadHandle] = []
        self._fencing = False
        self.restart(peers)
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

    def restart(self, peers: Mapping[str, PeerHandle]) -> None:
        """Begin anew over another transport's connections; what was read so far has ended."""
        self._peers = peers
        self._reads = deque(self._data_reads(max(1, SLICE_BYTES // self._piece_bytes)))
        self._handles = []
        self._fencing = False

    def abandon(self, now: float) -> None:
        """The transport has ended, and with it all reads of a failed pull."""
        if self._handles and self.error is not None:
            self._handles = []
            self._quiet_at = now + QUIET_S

    def hold(self, now: float, quarantine_s: float) -> Hold:
        """What it keeps from being reused; a failed one ends the transport after `quarantine_s`."""
        request, ends_at = self.request, self.request.deadline
        reason = "blocks are being read from a peer"
        if self.error:
            end = "it ends, or the data plane starts anew"
            reason = f"a read of a failed pull goes on until {end}: {self.error}"
            ends_at = min(self.failed_at, now) + quarantine_s
        return Hold(
            kind="quarantine" if self.error else "pull",
            owner=request.request_id,
            reason=reason,
            age_s=now - request.asked_at,
            deadline_s=ends_at - now,
            block_ids=request.local_ids,
            peer=request.pool.incarnation,
        )

    def fail(self, error: TransferError) -> None:
        """Fail the caller's future now; reads in flight continue until they are terminal."""
        if self.is_open:
            self.error = error
            self._reads.clear()
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

    def _data_reads(self, max_blocks: int) -> Iterator[_Read]:
        """In slices of so many blocks, each one read a remote region."""
        remote = self.request.pool.blocks
        by_region: dict[int, list[Piece]] = {}
        for piece in self.request.pieces:
            by_region.setdefault(piece.region, []).append(piece)
        for runs in slices(self.request.runs, max_blocks):
            for index, parts in by_region.items():
                yield _Read(remote[index], self._memory.blocks, runs, parts)

    def _fence_read(self) -> _Read:
        whole = Piece(0, 0, 0, GENERATION_BYTES)
        generations = self.request.pool.generations
        return _Read(generations, self._memory.landing, self.request.runs, [whole])

    def _advance(self, transport: Transport, now: float) -> bool:
        """Post one more read, or the fence, or finish."""
        if self._reads:
            if len(self._handles) >= MAX_SLICES_IN_FLIGHT:
                return False
            self._post(transport, now, self._reads.popleft(), self._memory.block_bytes)
            return True
        if self._handles:
            return False
        if not self._fencing:
            self._fencing = True
            self._post(transport, now, self._fence_read(), GENERATION_BYTES)
            return True
        self._finish(now)
        return True

    def _post(self, transport: Transport, now: float, read: _Read, local_stride: int) -> None:
        if self._began_at is None:
            self._began_at = now
        ranges = read.extents(local_stride)
        peer = self._peers[read.remote.agent]
        try:
            handle = transport.post_read(peer, read.remote.memory, read.local, ranges)
            self._handles.append(handle)
        except TransferError as error:
            self._quiet_at = now + QUIET_S
            self.fail(error)

    def _finish(self, now: float) -> None:
        request = self.request
        actual: list[Any] = self._memory.landed[list(request.local_ids)].tolist()
        num_blocks = len(request.local_ids)
        reads = self._data_reads(num_blocks)
        self.result = PullResult(
            stale=self._fence.stale(request.expected, actual),
            num_blocks=num_blocks,
            num_bytes=num_blocks * self._piece_bytes,
            num_extents=sum(len(read.extents(self._memory.block_bytes)) for read in reads),
            seconds=now - (self._began_at or now),
        )
        self.pull.done.set_result(self.result)

    def crash(self, error: Exception, now: float) -> None:
        """Fail after an unexpected exception in a step, so that no caller waits for ever."""
        self._quiet_at = now + QUIET_S
        self.fail(PullFailed(f"peer {self.request.pool.incarnation}: {error!r}"))
