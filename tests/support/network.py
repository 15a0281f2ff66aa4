"""The network between the processes of a cluster, and how it is cut in one direction.

    Loopback     all on 127.0.0.1; nothing can be cut
    Namespaces   root: a network namespace a process, joined by a bridge; real packets are lost
    TcpProxy     else: a TCP proxy before every process, which stops to forward (tcp_proxy.py)

A cut by `Namespaces` is silent, as a dead cable is: the sender's neighbour table gets a hardware
address that does not exist, so that its packets leave and arrive nowhere. A route of kind
`blackhole` would fail local senders at once.
"""

from __future__ import annotations

import itertools
import os
import subprocess
from typing import Protocol

_NO_HARDWARE = "02:de:ad:00:00:01"
_tags = itertools.count(1)


class Network(Protocol):
    """Where each process listens, by which address others reach it, and what is cut."""

    def join(self, name: str) -> None:
        """Give `name` its place; once, before it starts."""

    def host(self, name: str) -> str:
        """The address on which `name` listens."""

    def reach(self, name: str, port: int) -> str:
        """The host by which others reach what `name` listens to on `port`."""

    def prefix(self, name: str) -> list[str]:
        """What its command begins with."""

    def started(self, name: str, pid: int) -> None:
        """`name` is this process now."""

    def cut(self, source: str, target: str) -> None:
        """From now on nothing that `source` sends reaches `target`."""

    def heal(self) -> None:
        """End all cuts."""

    def close(self) -> None:
        """Take everything down."""


class Loopback:
    """One host, one loopback device."""

    def join(self, name: str) -> None:
        """Nothing to prepare."""

    def host(self, name: str) -> str:
        return "127.0.0.1"

    def reach(self, name: str, port: int) -> str:
        return "127.0.0.1"

    def prefix(self, name: str) -> list[str]:
        return []

    def started(self, name: str, pid: int) -> None:
        """Nothing depends on the process."""

    def cut(self, source: str, target: str) -> None:
        raise NotImplementedError("a loopback device cannot be cut")

    def heal(self) -> None:
        """Nothing was cut."""

    def close(self) -> None:
        """Nothing was made."""


class Namespaces:
    """A namespace a process on one bridge; the tests' own address on it ends with .1."""

    def __init__(self) -> None:
        # Two runs at once on one machine differ in their pid.
        self._tag = f"dt{os.getpid() % 46656:x}{next(_tags)}"
        self._net = f"10.{64 + os.getpid() % 128}.{next(_tags) % 256}"
        self._hosts: dict[str, int] = {}
        self._cuts: set[tuple[str, str]] = set()
        _ip("link", "add", self._tag, "type", "bridge")
        _ip("addr", "add", f"{self._net}.1/24", "dev", self._tag)
        _ip("link", "set", self._tag, "up")

    @staticmethod
    def usable() -> bool:
        """Whether this machine lets us make namespaces and bridges."""
        if os.geteuid() != 0:
            return False
        try:
            probe = Namespaces()
        except (OSError, subprocess.CalledProcessError):
            return False
        try:
            probe.join("probe")
        except (OSError, subprocess.CalledProcessError):
            return False
        finally:
            probe.close()
        return True

    def join(self, name: str) -> None:
        number = self._hosts[name] = len(self._hosts) + 2
        space, wire = self._space(name), f"{self._tag}-{number}"
        _ip("netns", "add", space)
        _ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", wire, "master", self._tag, "up")
        _ip("-n", space, "addr", "add", f"{self._net}.{number}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        _ip("-n", space, "link", "set", "lo", "up")

    def host(self, name: str) -> str:
        return f"{self._net}.{self._hosts[name]}"

    def reach(self, name: str, port: int) -> str:
        return self.host(name)

    def prefix(self, name: str) -> list[str]:
        return ["ip", "netns", "exec", self._space(name)]

    def started(self, name: str, pid: int) -> None:
        """The kernel knows it by its namespace."""

    def cut(self, source: str, target: str) -> None:
        self._neighbour(source, target, "replace", "lladdr", _NO_HARDWARE, "nud", "permanent")
        self._cuts.add((source, target))

    def heal(self) -> None:
        for source, target in self._cuts:
            self._neighbour(source, target, "del")
        self._cuts.clear()

    def close(self) -> None:
        for name in self._hosts:
            _ip("netns", "del", self._space(name))  # its end of the wire goes with it
        self._hosts.clear()
        _ip("link", "del", self._tag)

    def _space(self, name: str) -> str:
        return f"{self._tag}-{name}"

    def _neighbour(self, source: str, target: str, verb: str, *rest: str) -> None:
        space, address = self._space(source), self.host(target)
        _ip("-n", space, "neigh", verb, address, *rest, "dev", "eth0")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)
