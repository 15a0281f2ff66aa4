"""The heartbeat of a worker: the figures of its engine, its data plane and its peers."""

from __future__ import annotations

import time

from engine.base.types import Health
from engine.pb.diptych.internal.v1 import registry_pb2 as pb
from engine.rpc.convert import enum_to_pb, to_pb
from engine.step.engine_thread import EngineThread
from kvtransfer.data_plane import DataPlane
from kvtransfer.peers import PeerTable


def health_of(engine: EngineThread) -> Health:
    """Whether this worker computes what it should, as far as it knows."""
    if engine.sick:
        return Health.SICK
    return Health.DEGRADED if engine.load.is_degraded(time.monotonic()) else Health.OK


def load_report(
    engine: EngineThread, plane: DataPlane, peers: PeerTable, *, draining: bool
) -> pb.Load | None:
    """The load now; None while the engine hangs: coordinators take silence for a loss."""
    if not engine.responsive:
        return None
    load, moved = engine.load, plane.counters
    totals = to_pb(
        pb.Totals,
        load.totals,
        blocks_pulled=moved.num_blocks,
        bytes_pulled=moved.num_bytes,
        pull_seconds=moved.seconds,
        stale_reads=moved.num_stale_blocks,
    )
    return to_pb(
        pb.Load,
        load,
        quarantined_blocks=moved.num_quarantined_blocks,
        draining=draining,
        health=enum_to_pb(health_of(engine)),
        links=[to_pb(pb.KVLink, link) for link in peers.links()],
        totals=totals,
    )
