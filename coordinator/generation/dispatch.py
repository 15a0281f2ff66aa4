"""Carries out what `coordinator.routing.retry` decides: reads the table, waits, raises.

One object for each choice of a request. Owned by the event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from coordinator.cluster.membership import Membership
from coordinator.cluster.worker import ClusterView
from coordinator.routing.policy import Plan
from coordinator.routing.retry import GiveUp, Retry, Wait
from engine.base.errors import DeadlineExceeded, Unavailable
from engine.telemetry.log import get_logger

_log = get_logger(__name__)


@dataclass(eq=False)
class Dispatch:
    """The attempts of one choice of a request."""

    retry: Retry
    membership: Membership
    clock: Callable[[], float] = time.monotonic
    # Raises Unavailable when there are to be no more attempts.
    check_open: Callable[[], None] = lambda: None

    def remaining_s(self) -> float:
        """Time until the request's deadline; raises DeadlineExceeded where there is none."""
        remaining_s = self.retry.deadline_s - self.clock()
        if remaining_s <= 0:
            raise DeadlineExceeded("the request's time ran out")
        return remaining_s

    async def next(self, num_tokens: int, *, alone: bool = False) -> Plan:
        """The workers of the next attempt for `num_tokens` of prompt and output so far.

        `alone`: the decode worker computes all of it. Raises Unavailable, DeadlineExceeded;
        Mismatch where only workers of another model are there.
        """

        def decide(cluster: ClusterView) -> Plan | Wait | GiveUp:
            self.check_open()
            return self.retry.next(cluster, num_tokens, computes_alone=alone)

        plan = await self._settled(decide)
        assert plan is not None, "`Retry.next` decides"
        return plan

    async def failed(self, plan: Plan, error: Unavailable) -> None:
        """An attempt was lost: returns after a moment if there may be another.

        Raises Unavailable, WorkersLost, DeadlineExceeded.
        """
        self.retry.failed(plan, error, self.clock())
        await self._settled(self.retry.after_failure)

    async def _settled(
        self, decide: Callable[[ClusterView], Plan | Wait | GiveUp | None]
    ) -> Plan | None:
        """The decision, after the waits that it asks for. Raises the error of GiveUp."""
        while isinstance(decision := decide(self.membership.view()), Wait):
            await self.membership.wait_for_change(decision.timeout_s)
        if not isinstance(decision, GiveUp):
            return decision
        if decision.harmed:
            _log.error(
                "request given up: workers were lost under it", workers=list(decision.harmed)
            )
        raise decision.error
