"""The heartbeat of a worker: the figures of its engine, its data plane and its peers."""

from __future__ import annotations

import time

from engine.base.types import Health
from engine.pb.diptych.internal.v1 import registry_pb2 as pb
from engine.rpc.convert import health_to_pb, values_of
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
    return pb.Load(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        waiting_tokens=load.waiting_tokens,
        free_blocks=load.free_blocks,
        cached_blocks=load.cached_blocks,
        held_blocks=load.held_blocks,
        total_blocks=load.total_blocks,
        quarantined_blocks=moved.num_quarantined_blocks,
        draining=draining,
        health=health_to_pb(health_of(engine)),
        links=[pb.KVLink(**values_of(link)) for link in peers.links()],
        role_budgets=pb.RoleBudgets(**values_of(load.role_budgets)),
        totals=pb.Totals(
            prompt_tokens_computed=load.prompt_tokens_computed,
            prompt_tokens_cached=load.prompt_tokens_cached,
            blocks_pulled=moved.num_blocks,
            bytes_pulled=moved.num_bytes,
            pull_seconds=moved.seconds,
            stale_reads=moved.num_stale_blocks,
            draft_tokens=load.draft_tokens,
            accepted_tokens=load.accepted_tokens,
        ),
    )
