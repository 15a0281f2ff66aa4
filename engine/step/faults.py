"""Handling of numbers that are not finite: the cause is found, and its blocks are dropped.

a broken row -> its damaged blocks --- of a peer ---> forget the peer's blocks
                      |-------------- of this worker -> degraded for DEGRADED_S
                      '-> self-test --- fails -------> SelfTestFailed: the worker ends
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from engine.base.errors import SelfTestFailed, Unavailable
from engine.base.types import FinishReason
from engine.scheduling.block_pool import NO_SOURCES
from engine.scheduling.request import Request, State
from engine.scheduling.scheduler import Scheduler
from engine.step.health import Health
from engine.step.lifecycle import Lifecycle, degraded_peer
from engine.telemetry.log import get_logger
from engine.telemetry.metrics import WorkerMetrics

_log = get_logger(__name__)
DEGRADED_S = 60.0  # how long a worker reports that its numbers were not finite


@dataclass(slots=True, eq=False)
class Faults:
    """Owned by the engine thread."""

    scheduler: Scheduler
    lifecycle: Lifecycle
    health: Health
    metrics: WorkerMetrics
    clock: Callable[[], float]
    degraded_until_s: float = -math.inf

    def discard(self, broken: Sequence[Request]) -> None:
        """End the requests with numbers that are not finite in a step, and test this worker.

        The caller books nothing of the step, for the other rows' numbers came from the same
        computation: no token is sent, no block gets a hash, and the next step begins where this one
        began. A request that ends so goes on at another worker. Where a complete block that it read
        is damaged, the fault is that block's. If a peer sent it, all blocks that this peer had a
        part in are forgotten.
        """
        self.metrics.non_finite_requests.inc(len(broken))
        damaged = [self.health.damaged(r.table.held(0, r.num_hashed)) for r in broken]
        # A second copy of a block has no hash, and its sources are not kept: any may be it.
        causes = [
            (self.scheduler.pool.sources(blocks) or request.sources) if blocks else NO_SOURCES
            for request, blocks in zip(broken, damaged, strict=True)
        ]
        for request, blocks, peers in zip(broken, damaged, causes, strict=True):
            _log.error(
                "numbers are not finite",
                request_id=request.work.request_id,
                num_damaged_blocks=len(blocks),
                peers=sorted(peers),
            )
            self.scheduler.pool.hide(blocks)
            self.lifecycle.finish(request, FinishReason.ABORTED, _error(request, peers))
        for peer in NO_SOURCES.union(*causes):
            self.forget(peer, for_good=False)
        if not all(causes):
            self.degraded_until_s = self.clock() + DEGRADED_S
        self.test()

    def forget(self, source: str, *, for_good: bool) -> None:
        """Find and use no block that a peer, by its incarnation, had a part in.

        `for_good`: take nothing more from it. Where its blocks were damaged, the coordinator
        decides that, which knows whether other workers can compute them. Requests that read such
        blocks begin anew, after the tokens that they have.
        """
        num_blocks = self.scheduler.pool.forget(source, for_good=for_good)
        self.metrics.kv_blocks_forgotten.inc(num_blocks)
        for request in list(self.scheduler.active):
            if source in request.sources and request.state is State.RUNNING:
                self.scheduler.preempt(request)
        if num_blocks:
            _log.warning("blocks of a sick peer forgotten", peer=source, num_blocks=num_blocks)

    def test(self) -> None:
        """Raise SelfTestFailed unless this worker computes what it did at its start."""
        try:
            self.health.self_test()
        except SelfTestFailed:
            self.metrics.self_tested("failed")
            raise
        self.metrics.self_tested("passed")


def _error(request: Request, peers: Collection[str]) -> Unavailable:
    """The error of a request with numbers that were not finite."""
    if not peers:
        return Unavailable("this worker computed numbers that are not finite", sick=True)
    if request.work.source in peers:
        return degraded_peer()
    return Unavailable("cached blocks of a sick peer were dropped")
