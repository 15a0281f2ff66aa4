"""GET as often as a check likes: `httpx.get` makes a TLS context each time, for which it takes from
the processes under test 50 ms of a core.
"""

from __future__ import annotations

from collections.abc import Mapping

import httpx

# Kept connections would be to processes that have been killed since.
_CLIENT = httpx.Client(verify=False, limits=httpx.Limits(max_keepalive_connections=0))


def http_get(
    url: str, timeout_s: float = 5.0, headers: Mapping[str, str] | None = None
) -> httpx.Response:
    """Over a new connection, from any thread. Raises httpx.HTTPError."""
    return _CLIENT.get(url, timeout=timeout_s, headers=headers)
