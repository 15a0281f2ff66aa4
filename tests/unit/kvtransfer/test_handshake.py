"""What a handshake hands out survives the wire; a description that cannot be read is refused."""

import dataclasses

import pytest

from engine.base.errors import Mismatch
from engine.base.kv_layout import KVLayout, LayerGroup
from engine.pb.diptych.internal.v1 import worker_pb2 as pb
from kvtransfer.handshake import check_readable, pool_of, pool_response
from kvtransfer.transport import Agent, MemoryRegion, Region, RemotePool

DRAFT = KVLayout(num_layers=1, num_kv_heads=2, head_dim=4, block_size=4, dtype="float32")
LAYOUT = KVLayout(2, 4, 8, 4, "float32", DRAFT)
NUM_BLOCKS = 10


def pool(num_ranks: int, layout: KVLayout = LAYOUT) -> RemotePool:
    """Of a worker whose heads lie on so many ranks."""
    regions = []
    for rank in range(num_ranks):
        part = layout.shard(rank, num_ranks)
        memory = MemoryRegion(4096 * rank, NUM_BLOCKS * part.block_bytes, "VRAM", rank)
        agent = f"me-{rank}.1"
        regions.append(Region("blocks", rank, agent, part.block_bytes, memory, part.groups))
    generations = Region("generations", 0, "me-0.1", 8, MemoryRegion(8, NUM_BLOCKS * 8))
    agents = tuple(Agent(region.agent, b"of " + region.agent.encode()) for region in regions)
    return RemotePool("me", NUM_BLOCKS, (*regions, generations), agents, "here")


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_a_pool_survives_the_wire(num_ranks: int) -> None:
    described = pool(num_ranks)
    wire = pool_response(described, "digest").SerializeToString()
    assert pool_of(pb.HandshakeResponse.FromString(wire)) == described
    assert (described.memory_kind, len(described.blocks)) == ("VRAM", num_ranks)


@pytest.mark.parametrize(("remote", "local"), [(1, 1), (1, 2), (2, 1), (4, 2), (2, 8), (8, 1)])
def test_any_split_of_the_same_layers_can_be_read(remote: int, local: int) -> None:
    check_readable(pool(remote), pool(local))


def test_other_layers_cannot_be_read() -> None:
    for other in (dataclasses.replace(LAYOUT, draft=None), dataclasses.replace(LAYOUT, head_dim=4)):
        with pytest.raises(Mismatch, match="blocks cannot be read: layer groups with heads of"):
            check_readable(pool(1, other), pool(2))
    half = dataclasses.replace(pool(2), regions=pool(2).regions[1:])
    with pytest.raises(Mismatch, match="KV head 0 of layer group 0 is on no rank"):
        check_readable(half, pool(1))


def changed(index: int, **changes: object) -> RemotePool:
    """A pool of two ranks whose region of this index is another one."""
    regions = [*pool(2).regions]
    regions[index] = dataclasses.replace(regions[index], **changes)  # type: ignore[arg-type]
    return dataclasses.replace(pool(2), regions=tuple(regions))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dataclasses.replace(pool(2), regions=pool(2).regions[:2]), "generations once"),
        (dataclasses.replace(pool(2), regions=pool(2).regions[2:]), "blocks of each rank"),
        (dataclasses.replace(pool(2), agents=pool(2).agents[:1]), "rank 1: agent 'me-1.1' is none"),
        (dataclasses.replace(pool(2), num_blocks=11), "blocks of rank 0: its memory does not hold"),
        (changed(1, groups=(LayerGroup(0, 9, 999, 0),)), "blocks of rank 1: a group of layers"),
        (changed(2, stride=4), "generations: stride 4, not 8"),
    ],
)
def test_an_impossible_pool_is_refused(bad: RemotePool, message: str) -> None:
    with pytest.raises(Mismatch, match=message):
        pool_of(pool_response(bad, "digest"))


def test_unknown_kinds_are_refused() -> None:
    response = pool_response(pool(1), "digest")
    response.regions[0].kind = pb.Region.KIND_UNSPECIFIED
    with pytest.raises(Mismatch, match="region kind 0"):
        pool_of(response)
    response = pool_response(pool(1), "digest")
    response.regions[0].memory.kind = "TAPE"
    with pytest.raises(Mismatch, match="memory kind 'TAPE'"):
        pool_of(response)
