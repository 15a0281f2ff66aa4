"""The peers this worker may read from, keyed by incarnation: a restarted process is another peer.

    unknown --connect: Handshake, then metadata--> connected
       ^---- forget, lost, oldest of too many ---------+

Owned by the asyncio loop. The data plane keeps its own view; this table only decides which peers it
connects to. A caller that gets PeerLost from a pull calls `forget` and may then connect again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import grpc

from engine.base.errors import Mismatch
from engine.base.types import KVLink, Peer
from engine.pb.diptych.internal.v1 import worker_pb2 as pb
from engine.pb.diptych.internal.v1.worker_pb2_grpc import KvServiceStub
from kvtransfer.data_plane import DataPlane
from kvtransfer.handshake import check_readable, pool_of
from kvtransfer.transport import PeerLost, RemotePool


@dataclass(slots=True, eq=False)
class PeerTable:
    """Connects to peers once, remembers a bounded number of them.

    `stub_factory` gives the KvService stub of an address (HOST:PORT).
    """

    data_plane: DataPlane
    digest: str  # this worker's compatibility digest
    stub_factory: Callable[[str], KvServiceStub]
    max_peers: int = 64
    timeout_s: float = 10.0
    # By incarnation, least recently used first.
    _peers: OrderedDict[str, tuple[Peer, RemotePool]] = field(default_factory=OrderedDict)
    _connecting: dict[str, asyncio.Task[RemotePool]] = field(default_factory=dict)
    _dropping: set[asyncio.Future[None]] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self._peers)

    async def connect(self, peer: Peer) -> RemotePool:
        """The peer's pool, ready for `DataPlane.pull`; concurrent calls share one handshake.

        Mismatch: another digest. PeerLost: unreachable, or the address belongs to another
        incarnation.
        """
        if peer.incarnation in self._peers:
            self._peers.move_to_end(peer.incarnation)
            return self._peers[peer.incarnation][1]
        task = self._connecting.get(peer.incarnation)
        if task is None:
            task = asyncio.create_task(self._connect(peer), name=f"kv-handshake {peer.address}")
            self._connecting[peer.incarnation] = task
            task.add_done_callback(lambda done: self._connected(peer, done))
        return await asyncio.shield(task)  # one caller's cancellation is not the others'

    @property
    def addresses(self) -> set[str]:
        """Addresses of the remembered peers."""
        return {peer.address for peer, _ in self._peers.values()}

    def links(self) -> list[KVLink]:
        """What reads have shown of each remembered peer, of its latest process."""
        found = self.data_plane.links()
        known = self._peers.copy()
        latest = {known[i][0].worker_id: found[i] for i in known if i in found}
        return [replace(link, worker_id=worker_id) for worker_id, link in latest.items()]

    async def forget(self, pool: RemotePool) -> None:
        """Drop a peer and disconnect it; returns when its last read is over.

        `pool` is what `connect` gave: a connection made since then is left alone.
        """
        if self._peers.get(pool.incarnation, (None, None))[1] is pool:
            del self._peers[pool.incarnation]
            await asyncio.wrap_future(self.data_plane.disconnect(pool.incarnation))

    def _connected(self, peer: Peer, task: asyncio.Task[RemotePool]) -> None:
        self._connecting.pop(peer.incarnation, None)
        if task.cancelled() or task.exception() is not None:
            return
        self._peers[peer.incarnation] = peer, task.result()
        while len(self._peers) > self.max_peers:
            oldest, _ = self._peers.popitem(last=False)
            drop = asyncio.wrap_future(self.data_plane.disconnect(oldest))
            self._dropping.add(drop)
            drop.add_done_callback(self._dropping.discard)

    async def _connect(self, peer: Peer) -> RemotePool:
        request = pb.HandshakeRequest(
            digest=self.digest, caller_incarnation=self.data_plane.incarnation
        )
        stub = self.stub_factory(peer.address)
        try:
            response = await stub.Handshake(request, timeout=self.timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise Mismatch(f"peer {peer.address}: {error.details()}") from error
            raise PeerLost(f"peer {peer.address}: {error.code().name} {error.details()}") from error
        pool = self._checked(peer, response)
        connected = asyncio.wrap_future(self.data_plane.connect(pool))
        try:
            await asyncio.wait_for(connected, self.timeout_s)
        except TimeoutError:
            raise PeerLost(f"peer {peer.address}: the data plane is busy") from None
        return pool

    def _checked(self, peer: Peer, response: pb.HandshakeResponse) -> RemotePool:
        """The pool that a handshake describes; the digest is compared before anything else."""
        if response.digest != self.digest:
            raise Mismatch(
                f"peer {peer.address}: compatibility digest {response.digest}, ours {self.digest}"
            )
        if response.incarnation != peer.incarnation:
            raise PeerLost(
                f"peer {peer.address} is now {response.incarnation}, not {peer.incarnation}"
            )
        try:
            pool = pool_of(response)
            check_readable(pool, self.data_plane.local_pool)
        except Mismatch as error:
            raise Mismatch(f"peer {peer.address}: {error}") from None
        return pool
