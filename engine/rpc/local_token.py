"""The token of a coordinator that runs on this machine, for commands of the same user.

A coordinator keeps its token in a file in memory, which ends with it, so there is no file to find,
to protect or to clean up. The kernel tells which process listens on an address, and opens that
file for the process's own user (and root) alone:

    HOST:PORT --/proc/net/tcp--> inode --/proc/PID/fd--> process --/proc/PID/fd/N--> token

Root opens the files of any process, so another user's process must not choose which: only a file
in memory counts, whose content is its maker's own. A link of the same name can be made to any file.
The token is for the IP address that was looked at. A name may lead to further ones, on which other
users' processes listen.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from engine.base.errors import ConfigError
from engine.rpc.trust import OPERATOR_NAME, SHARED_NAME, ClusterToken

_LISTENS = "0A"  # linux/tcp_states.h
_NEVER = 9  # of `_rank`
_Address = IPv4Address | IPv6Address


def local_token(address: str) -> ClusterToken | None:
    """What the workers of a coordinator of this user on HOST:PORT ask for; None: nothing is found.

    A token that is for operators alone does not count: any user may register as a worker there.
    """
    found = local_coordinator(address, SHARED_NAME)
    return found and found[1]


def local_coordinator(address: str, *names: str) -> tuple[str, ClusterToken] | None:
    """(IP:PORT, token) of the process of this user that listens on HOST:PORT, or None.

    `names`: of its file in memory; none: a token for operators, whatever workers ask for.
    """
    names = names or (SHARED_NAME, OPERATOR_NAME)
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError, UnicodeError):
        return None
    ours = [entry for entry in found if _is_ours(entry[0], entry[4])]
    for ip in dict.fromkeys(ip_address(entry[4][0]) for entry in ours):
        inodes = set(_listeners(ip, int(port)))
        token = _token_of(inodes, names) if inodes else None
        if token:
            return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}", token
    return None


def _token_of(inodes: set[str], names: tuple[str, ...]) -> ClusterToken | None:
    """The token of a process that has all of these sockets."""
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal():
            continue
        links: dict[str, Path] = {}
        with suppress(OSError):  # another user's, or one that has ended
            for entry in (process / "fd").iterdir():
                with suppress(OSError):
                    links[os.readlink(entry)] = entry
        wanted = (links.get(f"/memfd:{name} (deleted)") for name in names)
        shared = next(filter(None, wanted), None)
        if shared and inodes <= links.keys():
            with suppress(ConfigError, OSError):  # it ended meanwhile
                return _read(shared)
    return None


def _read(link: Path) -> ClusterToken | None:
    """A token, where the link leads to a file in memory."""
    probe = os.memfd_create("probe")
    file = os.open(link, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        # The kernel has a device of its own for them, which nothing else can be on.
        if os.fstat(file).st_dev != os.fstat(probe).st_dev:
            return None
        return ClusterToken.load(f"/proc/self/fd/{file}")
    finally:
        os.close(file)
        os.close(probe)


def _listeners(ip: _Address, port: int) -> Iterator[str]:
    """Names of the sockets here that take connections to IP:PORT, as /proc/PID/fd has them."""
    taking: dict[int, list[str]] = {}
    for name in ("tcp", "tcp6"):
        with suppress(OSError), open(f"/proc/net/{name}") as table:
            next(table)
            for line in table:
                _, local, _, state, *rest = line.split()
                bound, _, bound_port = local.partition(":")
                if state == _LISTENS and int(bound_port, 16) == port:
                    rank = _rank(_parsed(bound), ip)
                    taking.setdefault(rank, []).append(f"socket:[{rest[5]}]")
    taking.pop(_NEVER, None)
    yield from taking[min(taking)] if taking else ()


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


def _rank(bound: _Address, ip: _Address) -> int:
    """The kernel gives a connection to the listener of the lowest rank."""
    if bound == ip:
        return 0
    if bound.is_unspecified and bound.version == ip.version:
        return 1
    return 2 if bound.is_unspecified and bound.version == 6 else _NEVER  # [::] takes both
