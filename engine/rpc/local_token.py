"""Finds the token of a coordinator on this machine, for commands of the same user.

A coordinator keeps its token in a memfd, which ends with it. The kernel shows which process listens
on an address, and opens the memfd for the process's user (and root) only:

    HOST:PORT --/proc/net/tcp--> inode --/proc/PID/fd--> process --/proc/PID/fd/N--> token

Root can open the files of all users, so another user's process must not choose the file: only a
memfd is accepted, not a link of the same name to another file. The token is valid for the IP
address that was examined; a host name may have further addresses, on which other users listen.
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
from engine.rpc.auth import OPERATOR_NAME, SHARED_NAME, ClusterToken

_LISTENS = "0A"  # linux/tcp_states.h
_NEVER = 9  # a rank of `_rank`
_Address = IPv4Address | IPv6Address


def local_token(address: str) -> ClusterToken | None:
    """The token that workers need at this user's coordinator on HOST:PORT, or None.

    A token for operators only does not count: there any user may register as a worker.
    """
    found = local_coordinator(address, SHARED_NAME)
    return found and found[1]


def local_coordinator(address: str, *names: str) -> tuple[str, ClusterToken] | None:
    """(IP:PORT, token) of the process of this user that listens on HOST:PORT, or None.

    `names`: accepted names of its memfd; none: any token that operators can use.
    """
    names = names or (SHARED_NAME, OPERATOR_NAME)
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except (OSError, ValueError, UnicodeError):
        return None
    local = [entry for entry in found if _is_local(entry[0], entry[4])]
    for ip in dict.fromkeys(ip_address(entry[4][0]) for entry in local):
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
        with suppress(OSError):  # another user's process, or one that has ended
            for entry in (process / "fd").iterdir():
                with suppress(OSError):
                    links[os.readlink(entry)] = entry
        memfds = (links.get(f"/memfd:{name} (deleted)") for name in names)
        shared = next(filter(None, memfds), None)
        if shared and inodes <= links.keys():
            with suppress(ConfigError, OSError):  # it has just ended
                return _read(shared)
    return None


def _read(link: Path) -> ClusterToken | None:
    """The token, if the link leads to a memfd."""
    probe = os.memfd_create("probe")
    file = os.open(link, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        # All memfds, and nothing else, are on one device of the kernel.
        if os.fstat(file).st_dev != os.fstat(probe).st_dev:
            return None
        return ClusterToken.load(f"/proc/self/fd/{file}")
    finally:
        os.close(file)
        os.close(probe)


def _listeners(ip: _Address, port: int) -> Iterator[str]:
    """The sockets that accept connections to IP:PORT, as named in /proc/PID/fd."""
    by_rank: dict[int, list[str]] = {}
    for name in ("tcp", "tcp6"):
        with suppress(OSError), open(f"/proc/net/{name}") as table:
            next(table)
            for line in table:
                _, local, _, state, *rest = line.split()
                bound, _, bound_port = local.partition(":")
                if state == _LISTENS and int(bound_port, 16) == port:
                    rank = _rank(_parsed(bound), ip)
                    by_rank.setdefault(rank, []).append(f"socket:[{rest[5]}]")
    by_rank.pop(_NEVER, None)
    yield from by_rank[min(by_rank)] if by_rank else ()


def _is_local(family: int, sockaddr: tuple[object, ...]) -> bool:
    """Whether an address belongs to this machine: only then a socket can bind to it."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((sockaddr[0], 0))
            return True
    except OSError:
        return False


def _parsed(text: str) -> _Address:
    """An address of /proc/net/tcp: 32-bit words in this machine's byte order."""
    raw = b"".join(struct.pack("=I", int(text[i : i + 8], 16)) for i in range(0, len(text), 8))
    ip = ip_address(raw)
    return (isinstance(ip, IPv6Address) and ip.ipv4_mapped) or ip


def _rank(bound: _Address, ip: _Address) -> int:
    """Precedence of a listener: the kernel gives a connection to the lowest rank."""
    if bound == ip:
        return 0
    if bound.is_unspecified and bound.version == ip.version:
        return 1
    return 2 if bound.is_unspecified and bound.version == 6 else _NEVER  # [::] accepts IPv4 too
