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
from dataclasses import replace

import grpc

from engine.base.errors import Mismatch
from engine.base.types import KVLink, Peer
from engine.pb.diptych.internal.v1 import worker_pb2 as pb
from engine.pb.diptych.internal.v1.worker_pb2_grpc import KvServiceStub
from kvtransfer.data_plane import DataPlane
from kvtransfer.handshake import check_readable, pool_of
from kvtransfer.transport import PeerLost, RemotePool


class PeerTable:
    """Connects to peers once, remembers a bounded number of them."""

    def __init__(
        self,
        data_plane: DataPlane,
        *,
        digest: str,
        stub_factory: Callable[[str], KvServiceStub],
        max_peers: int = 64,
        timeout_s: float = 10.0,
    ) -> None:
        """`stub_factory` gives the KvService stub of an address (HOST:PORT).

        `digest` is this worker's compatibility digest.
        """
        self._data_plane = data_plane
        self._digest = digest
        self._stub_factory = stub_factory
        self._max_peers = max_peers
        self._timeout_s = timeout_s
        self._pools: OrderedDict[str, RemotePool] = OrderedDict()  # least recently used first
        self._known: dict[str, Peer] = {}  # by incarnation
        self._connecting: dict[str, asyncio.Task[RemotePool]] = {}
        self._dropping: set[asyncio.Future[None]] = set()

    def __len__(self) -> int:
        return len(self._pools)

    async def connect(self, peer: Peer) -> RemotePool:
        """The peer's pool, ready for `DataPlane.pull`; concurrent calls share one handshake.

        Mismatch: another digest. PeerLost: unreachable, or the address belongs to another
        incarnation.
        """
        pool = self._pools.get(peer.incarnation)
        if pool is not None:
            self._pools.move_to_end(peer.incarnation)
            return pool
        task = self._connecting.get(peer.incarnation)
        if task is None:
            task = asyncio.create_task(self._connect(peer), name=f"kv-handshake {peer.address}")
            self._connecting[peer.incarnation] = task
            task.add_done_callback(lambda done: self._connected(peer.incarnation, done))
        return await asyncio.shield(task)  # one caller's cancellation is not the others'

    @property
    def addresses(self) -> set[str]:
        """Addresses of the remembered peers."""
        return {peer.address for peer in self._known.values()}

    def links(self) -> list[KVLink]:
        """What reads have shown of each remembered peer, of its latest process."""
        found = self._data_plane.links()
        known = self._known.copy()
        latest = {known[i].worker_id: found[i] for i in known if i in found}
        return [replace(link, worker_id=worker_id) for worker_id, link in latest.items()]

    async def forget(self, pool: RemotePool) -> None:
        """Drop a peer and disconnect it; returns when its last read is over.

        `pool` is what `connect` gave: a connection made since then is left alone.
        """
        if self._pools.get(pool.incarnation) is pool:
            del self._pools[pool.incarnation]
            self._known.pop(pool.incarnation, None)
            await asyncio.wrap_future(self._data_plane.disconnect(pool.incarnation))

    def _connected(self, incarnation: str, task: asyncio.Task[RemotePool]) -> None:
        self._connecting.pop(incarnation, None)
        if task.cancelled() or task.exception() is not None:
            self._known.pop(incarnation, None)
            return
        self._pools[incarnation] = task.result()
        while len(self._pools) > self._max_peers:
            _, oldest = self._pools.popitem(last=False)
            self._known.pop(oldest.incarnation, None)
            drop = asyncio.wrap_future(self._data_plane.disconnect(oldest.incarnation))
            self._dropping.add(drop)
            drop.add_done_callback(self._dropping.discard)

    async def _connect(self, peer: Peer) -> RemotePool:
        request = pb.HandshakeRequest(
            digest=self._digest, caller_incarnation=self._data_plane.incarnation
        )
        stub = self._stub_factory(peer.address)
        try:
            response = await stub.Handshake(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise Mismatch(f"peer {peer.address}: {error.details()}") from error
            raise PeerLost(f"peer {peer.address}: {error.code().name} {error.details()}") from error
        pool = self._checked(peer, response)
        self._known[peer.incarnation] = peer
        connected = asyncio.wrap_future(self._data_plane.connect(pool))
        try:
            await asyncio.wait_for(connected, self._timeout_s)
        except TimeoutError:
            raise PeerLost(f"peer {peer.address}: the data plane is busy") from None
        return pool

    def _checked(self, peer: Peer, response: pb.HandshakeResponse) -> RemotePool:
        """The pool that a handshake describes; the digest is compared before anything else."""
        if response.digest != self._digest:
            raise Mismatch(
                f"peer {peer.address}: compatibility digest {response.digest}, ours {self._digest}"
            )
        if response.incarnation != peer.incarnation:
            raise PeerLost(
                f"peer {peer.address} is now {response.incarnation}, not {peer.incarnation}"
            )
        try:
            pool = pool_of(response)
            check_readable(pool, self._data_plane.local_pool)
        except Mismatch as error:
            raise Mismatch(f"peer {peer.address}: {error}") from None
        return pool
