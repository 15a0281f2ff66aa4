"""Workers and clusters as values, without a table."""

from __future__ import annotations

import random

from coordinator.cluster.worker import ClusterView, Load, Worker, WorkerState
from engine.base.types import Health, ModelIdentity, Peer, Role

MODEL = ModelIdentity("m", "00ff", "profile", 8192, 16, 320)
OTHER = ModelIdentity("m", "11ee", "profile", 8192, 16, 320)
NOW_S = 1000.0


def worker(name: str, role: Role = Role.DECODE, **changes) -> Worker:
    """A ready worker that was heard just now, with nothing to do."""
    values = {"state": WorkerState.READY, "load": Load(), "heard_s": NOW_S, "model": MODEL}
    values |= {"session": 1, "since_s": 0.0, "http_address": "", **changes}
    return Worker(Peer(name, f"of-{name}", "127.0.0.1:1"), role, **values)


def view(*workers: Worker, now_s: float = NOW_S) -> ClusterView:
    """These workers, in order of their ids."""
    return ClusterView(tuple(sorted(workers, key=lambda w: w.peer.worker_id)), now_s)


def random_worker(rng: random.Random, name: str) -> Worker:
    """Anything that a table may hold; small numbers, so that ties occur."""
    load = Load(
        num_running=rng.choice((0, 0, 1, 7)),
        num_waiting=rng.choice((0, 0, 1, 4, 5, 6)),
        waiting_tokens=rng.choice((0, 0, 16, 900)),
        health=rng.choice((Health.OK,) * 8 + (Health.DEGRADED, Health.SICK)),
    )
    return worker(
        name,
        rng.choice((Role.DECODE, Role.PREFILL)),
        state=rng.choice((WorkerState.READY,) * 6 + tuple(WorkerState)),
        load=load,
        model=rng.choice((MODEL, MODEL, MODEL, OTHER)),
        heard_s=NOW_S - rng.choice((0.0, 0.4, 0.999, 1.0, 2.9, 3.0, 3.1)),
        assigned_requests=rng.choice((0, 0, 1, 8)),
        assigned_tokens=rng.choice((0, 0, 16, 1000)),
        penalized_until_s=rng.choice((-float("inf"),) * 4 + (NOW_S + 0.1, NOW_S, NOW_S + 4)),
        is_sick=rng.random() < 0.05,
    )
