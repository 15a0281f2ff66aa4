"""The transport of this moment, under its agent's name, and the peers connected to it.

    open() --> agent n: connect, disconnect ... --end()--> nothing of it can land any more
      ^                                           |  '--- AgentStuck: it hung, or raised
      +------------- agent n + 1 -----------------+

A peer has one agent a rank, all of which are connected or none is.

Used on the data-plane thread alone. Only the end of a transport runs in a thread of its own: it may
hang on a peer that does not answer. Then the thread is given up, and the process should end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from kvtransfer.transport import (
    Agent,
    MemoryRegion,
    PeerHandle,
    PeerLost,
    PullFailed,
    RemotePool,
    TransferError,
    Transport,
)

_NO_AGENT = Agent("", b"")
_NEVER_FREED: list[object] = []  # freeing a stuck agent could hang the thread that drops it


class AgentStuck(Exception):
    """A transport did not end: what it still writes is unknown until the process ends."""


@dataclass(slots=True)
class _Peer:
    """A connected peer; `closing` takes no new pull and is disconnected with its last read."""

    pool: RemotePool
    handles: dict[str, PeerHandle]  # by the agent's name
    closing: bool = False


@dataclass(slots=True, eq=False)
class Connections:
    """Owner of the transport. `factory` makes one for an agent's name.

    Agents are named `{incarnation}.{n}`, each once: peers would take a name that comes back for the
    old agent. `owner` of the regions' memory is kept with a transport that is given up.
    """

    factory: Callable[[str], Transport]
    incarnation: str
    regions: Sequence[MemoryRegion]
    owner: object
    transport: Transport | None = None
    agent: Agent = _NO_AGENT  # replaced as a whole; read it from any thread
    _num_agents: int = 0
    _peers: dict[str, _Peer] = field(default_factory=dict)  # by incarnation
    _disconnected: dict[str, list[Future[None]]] = field(default_factory=dict)

    def open(self) -> None:
        """A transport of a new name with all memory registered; raises what it raises."""
        self._num_agents += 1
        name = f"{self.incarnation}.{self._num_agents}"
        transport = self.factory(name)
        transport.register(self.regions)
        self.agent = Agent(name, transport.metadata())
        self.transport = transport

    def end(self, timeout_s: float) -> None:
        """Close the transport, whatever is in flight. Raises AgentStuck."""
        if (transport := self.transport) is None:
            return
        failures: list[BaseException] = []

        def close() -> None:
            try:
                transport.close()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=close, name="kv-agent-end", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if thread.is_alive() or failures:
            self.give_up()
            how = repr(failures[0]) if failures else f"no end within {timeout_s:.0f} s"
            raise AgentStuck(f"agent {self.agent.name} did not end: {how}")
        self.transport = None

    def give_up(self) -> None:
        """Never free the transport: it may write until the process ends, or hang the thread."""
        if self.transport is not None:
            _NEVER_FREED.append((self.transport, self.owner))

    def reconnect(self) -> None:
        """Connect the peers of the transport before this one; those that were closing are gone."""
        assert self.transport is not None
        old, self._peers = self._peers, {}
        for incarnation, peer in old.items():
            if peer.closing:
                self._complete(incarnation)
                continue
            try:
                handles = self._connect_agents(peer.pool)
            except TransferError:
                continue  # a pull finds it not connected, and a handshake follows
            self._peers[incarnation] = _Peer(peer.pool, handles)

    def connect(self, pool: RemotePool) -> None:
        """Make a peer's pool readable; repeating it is harmless. PeerLost, PullFailed."""
        if self.transport is None:
            raise PullFailed("the data plane has stopped")
        peer = self._peers.get(pool.incarnation)
        if peer is not None and not peer.closing and peer.pool.agents != pool.agents:
            self.lose(pool.incarnation)  # its data plane began anew
        if peer is None:
            self._peers[pool.incarnation] = _Peer(pool, self._connect_agents(pool))
        elif peer.closing:
            raise PeerLost(f"peer {pool.incarnation} is still being disconnected")

    def _connect_agents(self, pool: RemotePool) -> dict[str, PeerHandle]:
        assert self.transport is not None
        handles: dict[str, PeerHandle] = {}
        try:
            for agent in pool.agents:
                handles[agent.name] = self.transport.connect(agent.name, agent.metadata)
        except BaseException:
            for handle in handles.values():
                self.transport.disconnect(handle)
            raise
        return handles

    def handles_of(self, pool: RemotePool) -> dict[str, PeerHandle]:
        """For reads from that pool, by agent. PeerLost where its agents are not connected."""
        peer = self._peers.get(pool.incarnation)
        if peer is None or peer.closing or peer.pool.agents != pool.agents:
            raise PeerLost(f"peer {pool.incarnation} is not connected")
        return peer.handles

    def lose(self, incarnation: str) -> None:
        """Take no more pulls from a peer."""
        if peer := self._peers.get(incarnation):
            peer.closing = True

    def lose_all(self) -> None:
        """Take no more pulls from any peer."""
        for peer in self._peers.values():
            peer.closing = True

    def disconnect(self, incarnation: str, future: Future[None]) -> None:
        """Lose a peer; `future` completes when it is disconnected."""
        if incarnation in self._peers:
            self.lose(incarnation)
            self._disconnected.setdefault(incarnation, []).append(future)
        else:
            future.set_result(None)

    def disconnect_idle(self, busy: set[str]) -> None:
        """Disconnect closing peers, except the `busy` ones, which a pull still needs."""
        if self.transport is None:
            return
        for incarnation in [name for name, peer in self._peers.items() if peer.closing]:
            if incarnation not in busy:
                for handle in self._peers.pop(incarnation).handles.values():
                    self.transport.disconnect(handle)
                self._complete(incarnation)

    def _complete(self, incarnation: str) -> None:
        for future in self._disconnected.pop(incarnation, []):
            future.set_result(None)


def unfreed() -> bool:
    """Whether some transport was given up: then the process should end without cleaning up."""
    return bool(_NEVER_FREED)
