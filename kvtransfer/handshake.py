"""A KV pool on the wire: what a handshake hands out, and what its receiver checks. Pure."""

from __future__ import annotations

from engine.base.errors import Mismatch
from engine.base.kv_layout import GENERATION_BYTES
from engine.pb.diptych.internal.v1 import worker_pb2 as pb
from engine.rpc.convert import from_pb, to_pb
from kvtransfer.plan import pieces
from kvtransfer.transport import Region, RegionKind, RemotePool

_TO_WIRE: dict[RegionKind, pb.Region.Kind] = {
    "blocks": pb.Region.KIND_BLOCKS,
    "generations": pb.Region.KIND_GENERATIONS,
}
_FROM_WIRE = {value: kind for kind, value in _TO_WIRE.items()}


def pool_response(pool: RemotePool, digest: str) -> pb.HandshakeResponse:
    """The handshake's response for this pool."""
    regions = [to_pb(pb.Region, region, kind=_TO_WIRE[region.kind]) for region in pool.regions]
    return to_pb(pb.HandshakeResponse, pool, digest=digest, regions=regions)


def pool_of(response: pb.HandshakeResponse) -> RemotePool:
    """The pool of a response. Mismatch: it describes none that could be read."""
    pool = from_pb(RemotePool, response, regions=tuple(map(_region, response.regions)))
    kinds = [region.kind for region in pool.regions]
    if "blocks" not in kinds or kinds.count("generations") != 1:
        raise Mismatch(f"regions {kinds}: expected blocks of each rank, and generations once")
    names = {agent.name for agent in pool.agents}
    for region in pool.regions:
        where = f"{region.kind} of rank {region.rank}"
        if region.agent not in names:
            raise Mismatch(f"{where}: agent {region.agent!r} is none of {sorted(names)}")
        if region.memory.num_bytes < pool.num_blocks * region.stride:
            raise Mismatch(f"{where}: its memory does not hold {pool.num_blocks} blocks")
        if any(group.end > region.stride for group in region.groups):
            raise Mismatch(f"{where}: a group of layers exceeds its {region.stride} bytes a block")
    if pool.generations.stride != GENERATION_BYTES:
        raise Mismatch(f"generations: stride {pool.generations.stride}, not {GENERATION_BYTES}")
    return pool


def check_readable(pool: RemotePool, local: RemotePool) -> None:
    """Raise Mismatch unless `pool` has every head that the blocks of `local` hold."""
    for region in local.blocks:
        try:
            pieces(pool.blocks, region)
        except ValueError as error:
            raise Mismatch(f"blocks cannot be read: {error}") from None


def _region(region: pb.Region) -> Region:
    kind, memory = _FROM_WIRE.get(region.kind), region.memory
    if kind is None:
        raise Mismatch(f"region kind {region.kind}: expected one of {sorted(_FROM_WIRE)}")
    if memory.kind not in ("DRAM", "VRAM"):
        raise Mismatch(f"memory kind {memory.kind!r}: expected DRAM or VRAM")
    return from_pb(Region, region, kind=kind)
