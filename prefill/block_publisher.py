"""Finished blocks of one prompt, offered to the caller under leases.

    engine adds a pin -> a lease takes the pin over -> the caller reads -> Release, or TTL

Each block that the engine announced is either under a lease or unpinned here, also when the caller
is gone. The leases end with the call.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.pb.diptych.internal.v1 import worker_pb2 as pb
from engine.scheduling.events import AnnouncedEvent
from engine.step.engine_thread import Stream
from kvtransfer.service_host import ServiceHost


@dataclass(slots=True, eq=False)
class BlockPublisher:
    """Leases of one Prefill call; `owner` is the incarnation that may read and release them."""

    host: ServiceHost
    owner: str
    request_id: str
    _leases: list[bytes] = field(default_factory=list)

    def publish(self, event: AnnouncedEvent) -> pb.BlocksReady:
        """Put complete blocks under a new lease; returns the announcement.

        No await: between the engine's pin and the lease nothing can be cancelled.
        """
        lease = self.host.kv.table.grant(self.owner, event.block_ids, self.request_id)
        self._leases.append(lease.id)
        return pb.BlocksReady(
            lease=lease.id,
            ttl_s=self.host.transfer.lease_ttl_s,
            first_block=event.first_block,
            block_ids=event.block_ids,
            hashes=event.hashes,
            generations=event.generations,
        )

    async def checksummed(self, ready: pb.BlocksReady) -> pb.BlocksReady:
        """Add a checksum of every block; the lease keeps the blocks until then."""
        ready.checksums.extend(await self.host.checksums.of(ready.block_ids))
        return ready

    async def ended_within(self, timeout_s: float) -> bool:
        """Wait until every lease was released or ran out; False: some are left."""
        return await self.host.kv.ended_within(self._leases, timeout_s)

    async def revoke(self, stream: Stream) -> None:
        """End the request, and release what was announced and what still comes."""
        if not stream.finished:
            stream.abort()
            for event in await stream.drain():
                if isinstance(event, AnnouncedEvent):
                    await self.host.blocks.unpin(event.block_ids)
        await self.host.kv.release(self.owner, self._leases)
