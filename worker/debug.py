"""What a worker holds, with owner, reason, age and deadline, and whether that is all.

    loop          leases, announcements in flight, clean-ups        -+
    data plane    pulls, failed ones whose reads go on (quarantine)  +-> blocks with an owner
    engine        requests with their blocks                        -+
    engine        blocks with a reference ------> less those: `unexplained`

The engine's part is one operation, so a pool and its requests fit together. The data plane is read
before and after it. A block that passes from one owner to the next at that moment is looked up
again; only a block without an owner in every look is unexplained: a leak, by law 5 always 0.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from engine.base.errors import DiptychError
from engine.base.holds import NO_DEADLINE, Hold, holds_as_json
from engine.base.types import Role
from engine.scheduling.holds import EngineHolds
from engine.step.operations import ListHolds
from engine.telemetry.log import current_request
from kvtransfer.service_host import ServiceHost

_T = TypeVar("_T")
_ANSWER_S = 1.0  # for a thread to list what it holds
_LOOKS = 5
_PAUSE_S = 0.02  # between two looks: longer than a block is in flight between two owners
_MAX_SHOWN = 32  # of unexplained blocks, by id

_TASK_ENDS = "ends with what it waits for: a pull, a step of the engine, a call of at most 5 s"


@dataclass(frozen=True, slots=True)
class BackgroundTask:
    """A task that outlives its call: what it does, for which request, since when."""

    what: str
    request_id: str  # "": for no request
    since_s: float  # monotonic

    @classmethod
    def now(cls, what: str) -> BackgroundTask:
        """Return a task that begins now, for the request of this context."""
        return cls(what, current_request(), time.monotonic())


class Holds:
    """Collects what the owners of one worker hold. Lives on the asyncio loop."""

    def __init__(
        self, host: ServiceHost, role: Role, background: Mapping[asyncio.Task[Any], BackgroundTask]
    ) -> None:
        self._host = host
        self._role = role
        self._background = background

    async def report(self) -> dict[str, Any]:
        """Return the body of /debug/holds."""
        engine, pulls, unexplained = await self._look()
        for _ in range(_LOOKS - 1):
            if not unexplained:
                break
            await asyncio.sleep(_PAUSE_S)
            engine, pulls, again = await self._look()
            unexplained = None if again is None else unexplained & again
        holds = [
            *(engine.requests if engine else ()),
            *self._of_leases(),
            *self._of_announcements(),
            *(pulls or ()),
            *self._of_background(),
        ]
        return {
            "process": {"role": self._role.value, "incarnation": self._host.incarnation},
            "pool": _pool(engine, unexplained),
            "data_plane": self._data_plane(answers=pulls is not None),
            "holds": holds_as_json(holds),
        }

    async def _look(self) -> tuple[EngineHolds | None, list[Hold] | None, set[int] | None]:
        """Return the engine's holds, the data plane's pulls, and the held blocks without an owner.

        None where a thread does not answer: then the blocks without an owner are not known.
        """
        before = await _answer(asyncio.wrap_future(self._host.plane.holds()))
        of_loop = [*self._of_leases(), *self._of_announcements()]
        engine = await _answer(self._host.engine.call(ListHolds()))
        of_loop += [*self._of_leases(), *self._of_announcements()]
        after = await _answer(asyncio.wrap_future(self._host.plane.holds()))
        if engine is None or before is None or after is None:
            return engine, after, None
        holds = (*of_loop, *engine.requests, *before, *after)
        return engine, after, set(engine.held.difference(*(hold.block_ids for hold in holds)))

    def _of_leases(self) -> Iterable[Hold]:
        now = time.monotonic()
        for lease in self._host.kv.table.all:
            yield Hold(
                kind="lease",
                owner=lease.owner,
                reason="a peer may read these blocks; only that peer renews or releases it",
                age_s=now - lease.granted_at,
                deadline_s=lease.expires_at - now,
                block_ids=lease.block_ids,
                request_id=lease.request_id,
            )

    def _of_announcements(self) -> Iterable[Hold]:
        now = time.monotonic()
        for stream in self._host.engine.streams:
            end = stream.request.deadline_s
            for event, since in stream.undelivered.values():
                yield Hold(
                    kind="announcement",
                    owner=stream.request.request_id,
                    reason="complete blocks that were not sent to the caller yet",
                    age_s=now - since,
                    deadline_s=None if end is None else end - now,
                    note=NO_DEADLINE if end is None else "",
                    block_ids=tuple(event.block_ids),
                )

    def _of_background(self) -> Iterable[Hold]:
        now = time.monotonic()
        for task in self._background.values():
            yield Hold(
                kind="task",
                owner=task.request_id or self._host.incarnation,
                reason=f"{task.what} goes on beside its call, or after it",
                age_s=now - task.since_s,
                deadline_s=None,
                note=_TASK_ENDS,
            )

    def _data_plane(self, *, answers: bool) -> dict[str, Any]:
        counters = self._host.plane.counters
        return {
            "answers": answers,
            "agent": self._host.plane.agent,
            "restarts": counters.num_restarts,
            "quarantined_blocks": counters.num_quarantined_blocks,
        }


async def _answer(holds: Awaitable[_T]) -> _T | None:
    """None: the thread died, or hangs in a step, the transport or a restart."""
    try:
        async with asyncio.timeout(_ANSWER_S):
            return await holds
    except (TimeoutError, DiptychError):
        return None


def _pool(engine: EngineHolds | None, unexplained: set[int] | None) -> dict[str, Any]:
    if engine is None:
        return {"answers": False}
    shown_ids = {"unexplained_blocks": sorted(unexplained)[:_MAX_SHOWN]} if unexplained else {}
    return {
        "answers": True,
        "total": engine.num_blocks,
        "free": engine.num_free,
        "cached": engine.num_cached,
        "held": len(engine.held),
        "unexplained": None if unexplained is None else len(unexplained),
        **shown_ids,
    }
