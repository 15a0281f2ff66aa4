"""/debug/holds: the resources that a process holds, with owners and deadlines.

    {"process": ..., "pool": ..., "holds": [{kind, owner, reason, age_s, deadline_s, ...}, ...]}

Each hold has an owner, a reason, an age, and a deadline at which it ends whatever a peer does; if
there is no deadline, `note` gives the reason. Requests appear under pseudonyms that are equal in
all processes of a cluster, because clients choose their ids. With the cluster token
(`authorization: Bearer ...`) the response has the ids.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from engine.base.errors import PermissionDenied
from engine.http.guard import Refused
from engine.rpc.auth import ClusterToken
from engine.telemetry.log import get_logger

_log = get_logger(__name__)

HOLDS_PATH = "/debug/holds"
_JSON = "application/json"
_OWNED_BY_PROCESSES = ("lease",)  # kinds whose owner is a process, not a request


def holds_route(
    report: Callable[[], Awaitable[dict[str, Any]]],
    token: ClusterToken | None = None,
    refused: Refused = lambda reason: None,
) -> Route:
    """The route GET /debug/holds of `report`. Without a `token` request ids are never shown."""
    secret = token or ClusterToken.random()

    async def holds(request: Request) -> Response:
        authorization = request.headers.getlist("authorization")
        try:
            if authorization:
                secret.check_values(authorization)
        except PermissionDenied as error:
            refused("token")
            _log.warning("caller refused", path=HOLDS_PATH, peer=request.client, reason=str(error))
            return JSONResponse({"error": {"message": error.message}}, 403)
        found = await report()
        for hold in () if authorization else found["holds"]:
            for key in ("owner", "request_id"):
                if key in hold and not (key == "owner" and hold["kind"] in _OWNED_BY_PROCESSES):
                    hold[key] = secret.pseudonym(hold[key])
        return Response(json.dumps(found, indent=2) + "\n", media_type=_JSON)

    return Route(HOLDS_PATH, holds)
