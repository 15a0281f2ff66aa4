"""What a browser may not be led to: a server on this machine, by a page of someone else's.

A page whose name is made to point at 127.0.0.1 (DNS rebinding) is of the same origin as the server
there, and may read all of it. Its requests carry the page's name as `Host`. And any page may send a
POST, though it cannot read the answer. Its request carries `Origin`.

    listens on             Host                                         Origin of POST and the like
    loopback               localhost, a loopback address, the name      the same host, or one of
                           listened on, and `--allowed-hosts`           `--cors-origins`
    any other address      all; with `--allowed-hosts`: those, the
                           names above, and addresses

A request without `Host` (HTTP/1.0) or `Origin` comes from no browser, and passes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from prometheus_client import CollectorRegistry, Counter
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.telemetry.log import get_logger
from engine.telemetry.metrics import PREFIX

_log = get_logger(__name__)

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

Refused = Callable[[str], None]  # counts one request by the reason of its refusal


def refusals_counter(registry: CollectorRegistry) -> Refused:
    """Counts refused requests in `registry`."""
    counter = Counter(
        PREFIX + "http_refusals",
        "HTTP requests refused for their framing, host, origin or token.",
        ("reason",),
        registry=registry,
    )
    return lambda reason: counter.labels(reason).inc()


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """Names by which clients may call a server."""

    names: tuple[str, ...]  # lower case; "*.example.com": every name below it; "*": all
    addresses: bool  # every IP address, which no DNS name can be made to equal

    @classmethod
    def of(cls, allowed: str, listen: str, bound: str) -> AllowedHosts:
        """From a list with commas, HOST:PORT listened on, and the IP address that it means."""
        names = [_plain(name.strip(" []").lower()) for name in allowed.split(",") if name.strip()]
        loopback = _is_loopback(ip_address(bound))
        if not loopback and not names:
            names = ["*"]
        own = host_of(listen)
        return cls((*names, "localhost", *((own,) if own else ())), addresses=not loopback)

    def __contains__(self, host: str) -> bool:
        """Whether a `Host` header names one of them, with any port."""
        name = host_of(host)
        if "*" in self.names or name in self.names:
            return True
        if any(n.startswith("*.") and name.endswith(n[1:]) for n in self.names):
            return True
        try:
            address = ip_address(name)
        except ValueError:
            return False
        return self.addresses or _is_loopback(address) or str(address) in self.names


def host_of(authority: str) -> str:
    """The host of HOST[:PORT], lower case, without brackets; "" where it is malformed."""
    host, port = authority.lower(), ""
    if host.startswith("["):
        host, bracket, port = host[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            return ""
        port = port[1:]
    elif ":" in host:
        host, _, port = host.partition(":")
    if port and not (port.isascii() and port.isdigit()):
        return ""
    return host.removesuffix(".")


def _plain(name: str) -> str:
    """A name or an address in the one way in which they are compared."""
    try:
        return str(ip_address(name))
    except ValueError:
        return name.removesuffix(".")


def _is_loopback(address: IPv4Address | IPv6Address) -> bool:
    """Also where IPv6 writes an address of IPv4."""
    return ((isinstance(address, IPv6Address) and address.ipv4_mapped) or address).is_loopback


class Guard:
    """Answers 403 to requests for another host, or from another origin's page."""

    def __init__(self, app: ASGIApp, hosts: AllowedHosts, origins: str, refused: Refused) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = {origin.strip() for origin in origins.split(",") if origin.strip()}
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        headers = Headers(scope=scope)
        host = headers.get("host")
        if host is not None and host not in self._hosts:
            message = f"Host: {host[:100]!r} is not a name of this server (--allowed-hosts)"
            await self._refuse("host", message)(scope, receive, send)
        elif scope["method"] not in _SAFE_METHODS and not self._is_trusted(headers):
            origin = headers["origin"][:100]
            message = f"Origin: pages of {origin!r} may not call this server (--cors-origins)"
            await self._refuse("origin", message)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_trusted(self, headers: Mapping[str, str]) -> bool:
        """Whether a request is no browser's, or of a page that may send it."""
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return True
        # A browser's own word, which no page can set: it holds behind a proxy that changes Host.
        if headers.get("sec-fetch-site") == "same-origin":
            return True
        return origin.partition("://")[2].lower() == headers.get("host", "").lower()

    def _refuse(self, reason: str, message: str) -> Response:
        self._refused(reason)
        _log.warning("http request refused", reason=message)
        error = {
            "message": message,
            "type": "permission_error",
            "param": None,
            "code": f"{reason}_not_allowed",
        }
        return Response(
            json.dumps({"error": error}), status_code=403, media_type="application/json"
        )
