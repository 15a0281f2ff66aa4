"""What a process holds at the moment, and for whom: the answer of /debug/holds, in every process.

    {"process": ..., "pool": ..., "holds": [{kind, owner, reason, age_s, deadline_s, ...}, ...]}

Law 5 as an operator can read it: every hold has an owner, a reason, an age, and a moment at which
it ends whatever a peer does. Where there is no such moment, `note` says why.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

HOLDS_PATH = "/debug/holds"
_ALWAYS = {"kind", "owner", "reason", "age_s", "deadline_s"}


@dataclass(frozen=True, slots=True)
class Hold:
    """One hold; fields that do not apply stay as they are here, and are not shown."""

    kind: str
    owner: str
    reason: str
    age_s: float
    deadline_s: float | None  # seconds left; below 0: it ends at any moment; None: see `note`
    note: str = ""
    num_blocks: int = 0
    num_tokens: int = 0
    peer: str = ""
    request_id: str = ""

    def shown(self) -> dict[str, Any]:
        """As JSON has it: times to the millisecond."""
        return {
            key: round(value, 3) if isinstance(value, float) else value
            for key, value in asdict(self).items()
            if key in _ALWAYS or value
        }


def shown(holds: Iterable[Hold]) -> list[dict[str, Any]]:
    """As JSON has them, the oldest first."""
    return [hold.shown() for hold in sorted(holds, key=lambda hold: -hold.age_s)]


def holds_route(report: Callable[[], Awaitable[dict[str, Any]]]) -> Route:
    """GET /debug/holds of a process's own report."""

    async def holds(_request: Request) -> Response:
        text = json.dumps(await report(), indent=2) + "\n"
        return Response(text, media_type="application/json")

    return Route(HOLDS_PATH, holds)
