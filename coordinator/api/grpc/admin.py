"""AdminService: the workers, and the draining of one; see admin.proto."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from coordinator.cluster.membership import Membership
from coordinator.cluster.registry_service import RegistryServicer
from coordinator.cluster.worker import Worker, WorkerState
from engine.base.errors import DeadlineExceeded, InvalidRequest, NotFound
from engine.base.option_values import MAX_REQUEST_S
from engine.base.types import Health
from engine.pb.diptych.v1 import admin_pb2 as pb
from engine.rpc.convert import to_pb
from engine.telemetry.log import get_logger

_log = get_logger(__name__)

_DEFAULT_WAIT_S = 120.0  # for a drain without a deadline in the request
_END_S = 15.0  # from the end of a worker's requests to the end of its process


@dataclass(eq=False)
class AdminServicer:
    """Serves operators; see admin.proto."""

    membership: Membership
    registry: RegistryServicer
    clock: Callable[[], float] = time.monotonic

    async def ListWorkers(self, request: Any, context: Any) -> pb.ListWorkersResponse:
        """All workers that are registered or were recently."""
        now = self.clock()
        rows = [_row(worker, now) for worker in self.membership.snapshot()]
        return pb.ListWorkersResponse(workers=rows)

    async def DrainWorker(
        self, request: pb.DrainWorkerRequest, context: Any
    ) -> pb.DrainWorkerResponse:
        """Have a worker finish or hand over its requests and end. Returns when it has ended."""
        worker = self._worker(request.worker_id)
        deadline_s = request.deadline_s
        if not 0 <= deadline_s <= MAX_REQUEST_S:
            raise InvalidRequest("deadline_s", f"{deadline_s:g}; expected seconds, 0 or more")
        self.registry.drain(worker, deadline_s)
        _log.info("worker is to drain", worker=worker.peer.worker_id)
        wait_s = (deadline_s or _DEFAULT_WAIT_S) + _END_S
        ends_s = self.clock() + min(wait_s, context.time_remaining() or wait_s)
        while self._is_here(worker):
            if (left_s := ends_s - self.clock()) <= 0:
                raise DeadlineExceeded(f"worker {worker.peer.worker_id} is still draining")
            await self.membership.wait_for_change(min(left_s, 1.0))
        return pb.DrainWorkerResponse()

    def _worker(self, worker_id: str) -> Worker:
        rows = self.membership.snapshot()
        for row in rows:
            if row.peer.worker_id == worker_id:
                return row
        known = ", ".join(row.peer.worker_id for row in rows) or "none"
        if not worker_id:
            raise InvalidRequest("worker_id", f"unset; expected one of {known}")
        raise NotFound(f"worker_id: {worker_id!r} is not here; known: {known}")

    def _is_here(self, worker: Worker) -> bool:
        """Whether the worker still runs. A silent worker may."""
        return any(
            row.peer.incarnation == worker.peer.incarnation
            and (row.state is not WorkerState.SUSPECT or self.registry.hears(row))
            for row in self.membership.snapshot()
        )


def _row(worker: Worker, now: float) -> pb.Worker:
    load = worker.load
    return to_pb(
        pb.Worker,
        load,
        worker_id=worker.peer.worker_id,
        incarnation=worker.peer.incarnation,
        role=worker.role.value,
        state=worker.state.value,
        address=worker.peer.address,
        http_address=worker.http_address,
        model=worker.model.name,
        uptime_s=now - worker.since_s,
        max_model_len=worker.model.max_model_len,
        kv_pool_bytes=worker.kv_pool.num_bytes,
        kv_pool_limit=worker.kv_pool.limit,
        budget_prompt_tokens=load.role_budgets.prompt_tokens,
        budget_answers=load.role_budgets.answers,
        health=(Health.SICK if worker.is_sick else load.health).value,
        **asdict(load.totals),
    )
