"""Opens listening sockets on HOST:PORT."""

from __future__ import annotations

import socket

from engine.base.errors import ConfigError

_BACKLOG = 128


def check_free(*addresses: str) -> None:
    """Raise ConfigError if one address is not free; called before slow start-up work."""
    for address in addresses:
        if address:
            listen_on(address).close()


def listen_on(address: str) -> socket.socket:
    """A listening TCP socket on HOST:PORT (port 0: a free one). Raises ConfigError.

    It listens at once, because two sockets can be bound to one port while neither listens.
    """
    host, _, port = address.rpartition(":")
    try:
        family, kind, proto, _, sockaddr = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(sockaddr)
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
    except UnicodeError:  # from getaddrinfo, for a name that DNS cannot represent
        raise ConfigError(f"cannot listen on {address}: not a host name") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot listen on {address}: {reason}") from None
    return sock
