"""`prefill start` and `decode start` with seven seams that a test may open while they run:

    reads       post raises; a read ends late or never; a process is killed during a read
    intakes     held between the last block's commit and the first step      (a decode worker)
    messages    BlocksReady late, lost, doubled, reordered      (a prefill worker)
    releases    Release lost, doubled                           (a worker that others read from)
    numbers     logits that are NaN, KV that is NaN in one layer
    poison      a token that ends the process which computes it
    event loop  held up for a time by SIGUSR1, asleep or busy

    python -m tests.faults.fault_injection --orders FILE prefill|decode start ...

All else is the product's own. Orders are a JSON object in FILE, {fault: {id, times}}, looked up
at each event; what was done is appended to FILE with the suffix .done. Without an order everything
passes through.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import worker.process
from engine.base.types import Role
from engine.pb.diptych.internal.v1.worker_pb2 import RenewResponse
from engine.runner import runner
from kvtransfer.kv_service import KvServicer
from kvtransfer.nixl_transport import NixlTransport
from kvtransfer.transport import Extent, MemoryRegion, PeerLost, PullFailed, ReadState
from worker.cli import worker_command


class Orders:
    """What to break, as the file has it now. Any thread may ask."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._used: dict[int, int] = {}
        self._lock = threading.Lock()

    def standing(self, fault: str) -> dict[str, Any] | None:
        """The order for a fault, while it stands."""
        try:
            orders = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return None
        order = orders.get(fault)
        return order if isinstance(order, dict) else None

    def take(self, fault: str) -> dict[str, Any] | None:
        """The order for a fault, as many times as it asks for; noted as done."""
        order = self.standing(fault)
        if order is None:
            return None
        with self._lock:
            used = self._used.get(order["id"], 0)
            if used >= order["times"]:
                return None
            self._used[order["id"]] = used + 1
            with self._path.with_suffix(".done").open("a") as done:
                done.write(f"{fault}\n")
        return order


ORDERS = Orders(Path(os.devnull))


class LabTransport(NixlTransport):
    """NIXL with reads that go wrong. On the data-plane thread."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._landing: MemoryRegion | None = None
        self._late: dict[int, float] = {}  # handle -> when it may be called done

    def register(self, regions: Sequence[MemoryRegion]) -> None:
        super().register(regions)
        self._landing = regions[-1]

    def post_read(
        self, peer: Any, remote: MemoryRegion, local: MemoryRegion, extents: Sequence[Extent]
    ) -> Any:
        seam = "fence" if local == self._landing else "data"
        if order := ORDERS.take("post_raises"):
            kind = PeerLost if order.get("lost") else PullFailed
            raise kind(f"peer {peer}: the test injects this error")
        if order := ORDERS.take(f"{seam}_posted_late"):
            time.sleep(order["after_s"])
        if pid := _victim(seam, str(peer), sum(extent.num_bytes for extent in extents)):
            _kill_soon(pid)
        handle = super().post_read(peer, remote, local, extents)
        if seam == "data" and ORDERS.take("never_ends"):
            self._late[id(handle)] = float("inf")
        elif order := ORDERS.take(f"{seam}_ends_late"):
            self._late[id(handle)] = time.monotonic() + order["after_s"]
        return handle

    def poll(self, handle: Any) -> ReadState:
        state = super().poll(handle)
        until = self._late.get(id(handle), 0.0)
        if until == float("inf") and ORDERS.standing("never_ends") is None:
            until = 0.0
        return ReadState.PENDING if time.monotonic() < until else state

    def release(self, handle: Any) -> None:
        self._late.pop(id(handle), None)
        super().release(handle)


def _victim(seam: str, peer: str, num_bytes: int) -> int:
    """The pid to kill while this read is under way: this process, the peer it is from, or none (0).

    An agent is named by its process's incarnation and a number.
    """
    fault = f"kill_in_{seam}"
    order = ORDERS.standing(fault)
    if order is None or num_bytes < order.get("min_bytes", 0):
        return 0
    pids = order.get("pids")
    pid = os.getpid() if pids is None else pids.get(peer.partition(".")[0], 0)
    return pid if pid and ORDERS.take(fault) else 0


def _kill_soon(pid: int) -> None:
    """From another thread: posting a read blocks this one for as long as the copy takes."""

    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


class LabKv(KvServicer):
    """KvService with renewals and releases that go wrong."""

    async def Renew(self, request: Any, context: Any) -> Any:
        if ORDERS.take("lose_renewal"):
            return RenewResponse()  # as if all were well
        return await super().Renew(request, context)

    async def Release(self, request: Any, context: Any) -> Any:
        if ORDERS.take("lose_release"):
            await asyncio.sleep(3600)  # as if it had never come; the caller's deadline ends it
        if ORDERS.take("double_release"):
            await super().Release(request, context)
        return await super().Release(request, context)


def _sick_runner(kind: Any) -> None:
    """Have a runner's numbers go wrong. The self-test has a pool of its own, of two blocks."""
    from engine.runner.base import StepOutput

    launch = kind.launch

    def sick_launch(self: Any, rows: Any) -> Any:
        poison = ORDERS.standing("poison")
        if poison and any(poison["token"] in row.token_ids for row in rows):
            ORDERS.take("poison")
            os.kill(os.getpid(), signal.SIGKILL)
        logits = launch(self, rows).collect().logits
        of_test = self._kv_cache.num_blocks <= 2
        if ORDERS.standing("nan_logits") and len(logits) and ORDERS.take("nan_logits"):
            logits = logits.new_full(logits.shape, float("nan"))
        order = None if of_test else ORDERS.standing("nan_kv")
        if order and any(len(row.token_ids) > 1 for row in rows) and ORDERS.take("nan_kv"):
            for row in rows:
                block = row.block_ids[row.start // self._kv_cache.layout.block_size]
                self._kv_cache.pool[block, :, order["layer"]] = float("nan")
        return StepOutput(logits)

    kind.launch = sick_launch


def _stall(*_: Any) -> None:
    """Hold the event loop up, on its own thread."""
    if (order := ORDERS.take("stall")) is None:
        return
    until = time.monotonic() + order["for_s"]
    while time.monotonic() < until:
        if not order["busy"]:
            time.sleep(until - time.monotonic())


def _disturb_prefill() -> None:
    import worker.services
    from prefill.service import PrefillServicer

    class LabPrefill(PrefillServicer):
        """PrefillService whose announcements go wrong."""

        async def Prefill(self, request: Any, context: Any) -> AsyncGenerator[Any]:
            kept = None
            async with aclosing(super().Prefill(request, context)) as responses:
                async for response in responses:
                    if not response.HasField("ready"):
                        if kept is not None and response.HasField("finished"):
                            yield kept
                            kept = None
                        yield response
                        continue
                    late = ORDERS.standing("late_ready") or {}
                    meant = late.get("only", request.request_id) == request.request_id
                    if meant and ORDERS.take("late_ready"):
                        await asyncio.sleep(late["after_s"])
                    if ORDERS.take("lose_ready"):
                        continue
                    if ORDERS.take("double_ready"):
                        yield response
                    if kept is None and ORDERS.take("reorder_ready"):
                        kept = response
                        continue
                    yield response
                    if kept is not None:
                        yield kept
                        kept = None

    worker.services.PrefillServicer = LabPrefill  # type: ignore[misc]


def _disturb_decode() -> None:
    import decode.service
    from decode.kv_fetch import FetchJob, KvFetcher
    from engine.scheduling.events import FetchEvent

    class LabIntake(KvFetcher):
        """Has all blocks, and may be ordered to delay that news to the engine."""

        async def _round(self, fetch: FetchJob, wanted: FetchEvent, num_committed: int) -> int:
            num_committed = await super()._round(fetch, wanted, num_committed)
            order = ORDERS.standing("hold_intake") or {}
            if len(wanted.block_ids) >= order.get("min_blocks", 0) and ORDERS.take("hold_intake"):
                for _ in range(round(order["at_most_s"] / 0.02)):
                    if ORDERS.standing("hold_intake") is None:
                        break
                    await asyncio.sleep(0.02)
            return num_committed

    decode.service.KvFetcher = LabIntake  # type: ignore[misc]


def main() -> int:
    """Run one worker; returns its exit status."""
    global ORDERS
    flag, path, role, *argv = sys.argv[1:]
    assert flag == "--orders", "expected --orders FILE prefill|decode start ..."
    ORDERS = Orders(Path(path))
    worker.process.NixlTransport = LabTransport  # type: ignore[misc]
    worker.process.KvServicer = LabKv  # type: ignore[misc]
    signal.signal(signal.SIGUSR1, _stall)
    _sick_runner(runner.NativeRunner)
    _sick_runner(runner.Runner)
    _disturb_prefill()
    _disturb_decode()
    return worker_command(Role(role), argv)


if __name__ == "__main__":
    sys.exit(main())
