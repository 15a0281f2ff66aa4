"""Pages of other origins that may call the API from a browser. Off unless origins are named.

The headers stand on errors too, or a page would learn of none. There are no credentials to allow:
the API looks at none.
"""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

_EXPOSED = ("retry-after", "retry-after-ms", "x-request-id")
_PREFLIGHT_S = 600  # that a browser may keep the answer


def with_cors(app: ASGIApp, origins: str) -> ASGIApp:
    """`app`, callable from pages of `origins`: "*", or a list with commas between; "": none."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=[origin.strip() for origin in origins.split(",")],
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),
        expose_headers=_EXPOSED,
        max_age=_PREFLIGHT_S,
    )
