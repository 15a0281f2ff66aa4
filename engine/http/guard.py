"""Protects a server against requests that foreign web pages send through a user's browser.

A page whose name resolves to 127.0.0.1 (DNS rebinding) has the same origin as a server there, and
can read its responses. Such requests have the page's name as `Host`. Any page can send a POST,
though it cannot read the response. Such requests have an `Origin`.

    listens on             allowed Host                                 allowed Origin (not GET)
    loopback               localhost, loopback addresses, the host of   the same host, or one of
                           --http, and `--allowed-hosts`                `--cors-origins`
    any other address      all; with `--allowed-hosts`: those, the      the same
                           names above, and all addresses

A request without `Host` (HTTP/1.0) or `Origin` is not from a browser, and passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from prometheus_client import CollectorRegistry, Counter
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.telemetry.log import get_logger
from engine.telemetry.metrics import PREFIX

_log = get_logger(__name__)

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

Refused = Callable[[str], None]  # counts one refused request by reason


def refusals_counter(registry: CollectorRegistry) -> Refused:
    """A counter of refused requests in `registry`."""
    counter = Counter(
        PREFIX + "http_refusals",
        "HTTP requests refused for their framing, host, origin or token.",
        ("reason",),
        registry=registry,
    )
    return lambda reason: counter.labels(reason).inc()


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """Hosts that clients may use for a server."""

    names: tuple[str, ...]  # lower case; "*.example.com": all its subdomains; "*": all
    addresses: bool  # whether all IP addresses are allowed: DNS rebinding needs a name

    @classmethod
    def of(cls, allowed: str, listen: str, bound: str) -> AllowedHosts:
        """From --allowed-hosts, the HOST:PORT of the server, and the IP address of its socket."""
        names = [_plain(name.strip(" []").lower()) for name in allowed.split(",") if name.strip()]
        loopback = _is_loopback(ip_address(bound))
        if not loopback and not names:
            names = ["*"]
        own = host_of(listen)
        return cls((*names, "localhost", *((own,) if own else ())), addresses=not loopback)

    def __contains__(self, host: str) -> bool:
        """Whether a `Host` header names an allowed host, with any port."""
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
    """The host of HOST[:PORT], lower case, without brackets; "" if malformed."""
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
    """The canonical form of a name or address."""
    try:
        return str(ip_address(name))
    except ValueError:
        return name.removesuffix(".")


def _is_loopback(address: IPv4Address | IPv6Address) -> bool:
    """Whether it is a loopback address, IPv4-mapped IPv6 included."""
    return ((isinstance(address, IPv6Address) and address.ipv4_mapped) or address).is_loopback


class Guard:
    """Refuses requests with a `Host` or `Origin` that is not allowed, with status 403."""

    def __init__(self, app: ASGIApp, hosts: AllowedHosts, origins: str, refused: Refused) -> None:
        self._app = app
        self._hosts = hosts
        self._origins = {origin.strip() for origin in origins.split(",") if origin.strip()}
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse or forward one request."""
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
        """Whether a request is not from a browser, or from a page that may send it."""
        origin = headers.get("origin")
        if origin is None or "*" in self._origins or origin in self._origins:
            return True
        # Set by browsers, not by pages; also valid behind a proxy that changes Host.
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
        return JSONResponse({"error": error}, 403)
