"""What a process holds at the moment, and for whom: the answer of /debug/holds, in every process.

    {"process": ..., "pool": ..., "holds": [{kind, owner, reason, age_s, deadline_s, ...}, ...]}

A request is shown under a pseudonym, which is the same in all processes of a cluster: its id is its
caller's. Ids are shown to callers with the cluster token (`authorization: Bearer ...`).

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

from engine.base.errors import PermissionDenied
from engine.http.guard import Refused
from engine.rpc.trust import ClusterToken
from engine.telemetry.log import get_logger

_log = get_logger(__name__)

HOLDS_PATH = "/debug/holds"
_JSON = "application/json"
_OF_PROCESSES = ("lease",)  # kinds whose owner is a process; that of others is a request
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


def holds_route(
    report: Callable[[], Awaitable[dict[str, Any]]],
    token: ClusterToken | None = None,
    refused: Refused = lambda reason: None,
) -> Route:
    """GET /debug/holds of a process's own report. Without a `token` nothing shows request ids."""
    secret = token or ClusterToken.random()

    async def holds(request: Request) -> Response:
        given = request.headers.getlist("authorization")
        try:
            if given:
                secret.check_values(given)
        except PermissionDenied as error:
            refused("token")
            _log.warning("caller refused", path=HOLDS_PATH, peer=request.client, reason=str(error))
            body = {"error": {"message": error.message}}
            return Response(json.dumps(body), 403, media_type=_JSON)
        found = await report()
        for hold in () if given else found["holds"]:
            for key in (
                ("request_id",) if hold["kind"] in _OF_PROCESSES else ("owner", "request_id")
            ):
                if key in hold:
                    hold[key] = secret.pseudonym(hold[key])
        return Response(json.dumps(found, indent=2) + "\n", media_type=_JSON)

    return Route(HOLDS_PATH, holds)
