"""The token of a coordinator that runs on this machine, for commands of the same user.

A coordinator keeps its token in a file in memory, which ends with it, so there is no file to find,
to protect or to clean up. The kernel tells which process listens on an address, and opens that
file for the process's own user (and root) alone:

    HOST:PORT --/proc/net/tcp--> inode --/proc/PID/fd--> process --/proc/PID/fd/N--> token

The address has to be one of this machine: a token is for no other.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from engine.errors import ConfigError
from engine.rpc.trust import SHARED_NAME, ClusterToken

_LISTENS = "0A"  # linux/tcp_states.h
_Address = IPv4Address | IPv6Address


def local_token(address: str) -> ClusterToken | None:
    """Of the process of this user that listens on HOST:PORT; None where there is none."""
    inodes = set(_listeners(address))
    if not inodes:
        return None
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        links: dict[str, Path] = {}
        with suppress(OSError):  # another user's, or one that has ended
            for entry in (process / "fd").iterdir():
                with suppress(OSError):
                    links[os.readlink(entry)] = entry
        shared = next((links[k] for k in links if k.startswith(f"/memfd:{SHARED_NAME}")), None)
        if shared and not inodes.isdisjoint(links):
            with suppress(ConfigError):  # it ended meanwhile
                return ClusterToken.load(str(shared))
    return None


def _listeners(address: str) -> Iterator[str]:
    """Names of the sockets here that take connections to HOST:PORT, as /proc/PID/fd has them."""
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError, UnicodeError):
        return
    wanted = {ip_address(entry[4][0]) for entry in found if _is_ours(entry[0], entry[4])}
    for name in ("tcp", "tcp6") if wanted else ():
        with suppress(OSError), open(f"/proc/net/{name}") as table:
            next(table)
            for line in table:
                _, local, _, state, *rest = line.split()
                bound, _, bound_port = local.partition(":")
                here = state == _LISTENS and int(bound_port, 16) == int(port)
                if here and any(_takes(_parsed(bound), ip) for ip in wanted):
                    yield f"socket:[{rest[5]}]"


def _is_ours(family: int, where: tuple[object, ...]) -> bool:
    """Whether an address is one of this machine: only then a socket can have it."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((where[0], 0))
            return True
    except OSError:
        return False


def _parsed(text: str) -> _Address:
    """An address of /proc/net/tcp: words of 32 bits in this machine's order."""
    raw = b"".join(struct.pack("=I", int(text[i : i + 8], 16)) for i in range(0, len(text), 8))
    ip = ip_address(raw)
    return (isinstance(ip, IPv6Address) and ip.ipv4_mapped) or ip


def _takes(bound: _Address, ip: _Address) -> bool:
    if bound.is_unspecified:  # [::] takes both
        return bound.version == 6 or ip.version == 4
    return bound == ip
