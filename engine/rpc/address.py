"""HOST:PORT -> a listening socket, or one sentence why not."""

from __future__ import annotations

import socket

from engine.base.errors import ConfigError

_BACKLOG = 128


def check_free(*addresses: str) -> None:
    """Before work that takes a while: raise ConfigError where one cannot be listened on."""
    for address in addresses:
        if address:
            listen_on(address).close()


def listen_on(address: str) -> socket.socket:
    """A listening TCP socket on HOST:PORT (port 0: a free one). Raises ConfigError naming it.

    It listens already, for two sockets may be *bound* to one port as long as neither does.
    """
    host, _, port = address.rpartition(":")
    try:
        family, kind, proto, _, where = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(where)
            sock.listen(_BACKLOG)
            sock.setblocking(False)
        except OSError:
            sock.close()
            raise
    except UnicodeError:  # what getaddrinfo says of a name that no DNS can hold
        raise ConfigError(f"cannot listen on {address}: not a host name") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot listen on {address}: {reason}") from None
    return sock
