"""RegistryService: a worker's Register stream -> rows of the table of workers, and commands back.

worker --Hello, Load, Load ...--> listener task --> Membership
       <--Welcome, Drain, Forget- outbox          <-- drain(), or a worker found sick
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from coordinator.cluster.membership import Membership
from coordinator.cluster.worker import HEARTBEAT_S, Hello, Load, Worker
from engine.base.errors import InvalidRequest, Mismatch, Unavailable
from engine.base.types import Health, Peer, Role, RoleBudgets
from engine.pb.diptych.internal.v1 import registry_pb2
from engine.rpc.convert import enum_from_pb, from_pb, to_pb
from engine.telemetry.log import get_logger

_log = get_logger(__name__)

_SICK_DRAIN_S = 0.001  # what a sick worker still computes is of no use
_MAX_SICK = 64

Outbox = asyncio.Queue[registry_pb2.CoordinatorMessage | None]  # None: the stream is over


class RegistryServicer:
    """Serves workers; its streams end with them."""

    def __init__(self, membership: Membership, coordinator_id: str) -> None:
        self._membership = membership
        self._coordinator_id = coordinator_id
        self._outboxes: dict[str, Outbox] = {}  # by incarnation
        self._sick: deque[str] = deque(maxlen=_MAX_SICK)  # incarnations
        membership.on_sick = self._quarantine

    def hears(self, worker: Worker) -> bool:
        """Whether the worker's stream is open: its process has not ended."""
        return worker.peer.incarnation in self._outboxes

    def drain(self, worker: Worker, deadline_s: float) -> None:
        """Send Drain; 0: with the worker's own time limit. Raises Unavailable without a stream."""
        drain = registry_pb2.Drain(deadline_s=deadline_s)
        self._send(worker, registry_pb2.CoordinatorMessage(drain=drain))

    def set_role_budgets(self, worker: Worker, budgets: RoleBudgets) -> None:
        """Change what a worker takes from others; its next load reports what it applied.

        Raises InvalidRequest where both are 0 (use Drain), Unavailable without a stream.
        """
        if not budgets.prompt_tokens and not budgets.answers:
            raise InvalidRequest("role_budgets", "both 0; expected at least one above 0")
        pb = to_pb(registry_pb2.RoleBudgets, budgets)
        self._send(worker, registry_pb2.CoordinatorMessage(role_budgets=pb))

    def _send(self, worker: Worker, message: registry_pb2.CoordinatorMessage) -> None:
        outbox = self._outboxes.get(worker.peer.incarnation)
        if outbox is None:
            raise Unavailable(f"worker {worker.peer.worker_id} is not connected now")
        outbox.put_nowait(message)

    def _quarantine(self, sick: Worker) -> None:
        """End a sick worker, and have all others drop the blocks that it had a part in."""
        self._sick.append(sick.peer.incarnation)
        for incarnation, outbox in self._outboxes.items():
            if incarnation != sick.peer.incarnation:
                outbox.put_nowait(_forget(sick.peer.incarnation))
        with suppress(Unavailable):
            self.drain(sick, _SICK_DRAIN_S)

    async def Register(
        self, messages: AsyncIterator[registry_pb2.WorkerMessage], context: Any
    ) -> AsyncIterator[registry_pb2.CoordinatorMessage]:
        """One worker's stream; see registry.proto."""
        first = await anext(messages, None)
        if first is None or not first.HasField("hello"):
            raise InvalidRequest("hello", "unset; expected as the first message")
        hello = _hello(first.hello)
        try:
            worker = self._membership.register(hello)
        except Mismatch as error:
            _log.warning("worker refused", worker=hello.peer.worker_id, reason=error.message)
            refused = registry_pb2.Refused(reason=error.message)
            yield registry_pb2.CoordinatorMessage(refused=refused)
            return
        outbox: Outbox = asyncio.Queue()
        self._outboxes[hello.peer.incarnation] = outbox
        listener = asyncio.create_task(self._listen(messages, worker, outbox))
        try:
            welcome = registry_pb2.Welcome(
                coordinator_id=self._coordinator_id, heartbeat_s=HEARTBEAT_S
            )
            yield registry_pb2.CoordinatorMessage(welcome=welcome)
            for incarnation in tuple(self._sick):  # found before this stream began
                yield _forget(incarnation)
            while (message := await outbox.get()) is not None:
                yield message
            await listener
        finally:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)
            if self._outboxes.get(hello.peer.incarnation) is outbox:
                del self._outboxes[hello.peer.incarnation]
            self._membership.left(worker)

    async def ReportStall(
        self, request: registry_pb2.Stall, context: Any
    ) -> registry_pb2.StallNoted:
        """A worker's event loop does not turn; see registry.proto."""
        self._membership.stalled(request.worker_id, request.incarnation, request.lag_s)
        return registry_pb2.StallNoted()

    async def _listen(
        self, messages: AsyncIterator[registry_pb2.WorkerMessage], worker: Worker, outbox: Outbox
    ) -> None:
        """Take heartbeats until the stream ends or another process takes the place."""
        try:
            async for message in messages:
                if message.HasField("load") and not self._membership.heartbeat(
                    worker, _load(message.load)
                ):
                    return
        finally:
            outbox.put_nowait(None)


def _forget(incarnation: str) -> registry_pb2.CoordinatorMessage:
    forget = registry_pb2.Forget(incarnation=incarnation)
    return registry_pb2.CoordinatorMessage(forget=forget)


def _hello(pb: registry_pb2.Hello) -> Hello:
    role = enum_from_pb(Role, pb.role, None)
    if role is None:
        raise InvalidRequest("hello.role", "unset; expected prefill or decode")
    for field in ("worker_id", "incarnation", "address"):
        if not getattr(pb, field):
            raise InvalidRequest(f"hello.{field}", "empty")
    if pb.model.block_size < 1 or pb.model.max_model_len < 1:
        raise InvalidRequest("hello.model", "block_size and max_model_len are at least 1")
    return from_pb(Hello, pb, peer=from_pb(Peer, pb), role=role)


def _load(pb: registry_pb2.Load) -> Load:
    return from_pb(Load, pb, health=enum_from_pb(Health, pb.health, Health.DEGRADED))
