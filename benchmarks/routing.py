"""Time of a routing decision in a large cluster: `python -m benchmarks.routing [--workers N]`.

Two ways to see the cluster alternate in one process, each over the same table and the same changes:

    rebuilt   a row object for each worker and a sort at each look; three looks an attempt (the
              affinity, the decode worker, the prefill worker), each with its own choice
    cached    `Membership.view`, and one `Policy.plan`

Between two attempts `--changes` workers report their load, as heartbeats do. Ratios are the result;
the spread of the rounds is the noise.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from prometheus_client import CollectorRegistry

from coordinator.cluster.membership import Membership
from coordinator.cluster.worker import ClusterView, Hello, Load, Worker
from coordinator.routing.policy import RequestView, least_loaded, least_loaded_of
from engine.base.option_groups import LogOptions
from engine.base.types import PROTOCOL_VERSION, ModelIdentity, Peer, Role
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from engine.telemetry.log import configure_logging

_MODEL = ModelIdentity("m", "d", "p", 8192, 16, 1000)
_REQUEST = RequestView(num_tokens=1000, max_tokens=2000)


def _cluster(num_workers: int) -> tuple[Membership, list[Worker]]:
    """Half of the workers of each role, with loads that differ."""
    members = Membership("m", 1000, CoordinatorMetrics(CollectorRegistry(), "m"))
    workers = []
    for i in range(num_workers):
        role = Role.PREFILL if i % 2 else Role.DECODE
        peer = Peer(f"{role.value}-{i}", f"i{i}", "127.0.0.1:1")
        workers.append(members.register(Hello(peer, role, "", _MODEL, PROTOCOL_VERSION)))
        members.heartbeat(workers[-1], Load(waiting_tokens=1000 + i % 7))
    return members, workers


def _rebuilt(members: Membership) -> ClusterView:
    """As each look was made before the table kept its snapshot."""
    view = members.view()
    rows = {w.peer.worker_id: w for w in view.workers}
    copies = (replace(w, is_sick=w.is_degraded(view.now_s)) for _, w in sorted(rows.items()))
    return ClusterView(tuple(copies), view.now_s)


def _attempt_rebuilt(members: Membership) -> None:
    _rebuilt(members)
    for role in (Role.DECODE, Role.PREFILL):
        view = _rebuilt(members)
        least_loaded_of(view.ready(role), view.now_s)


def _attempt_cached(members: Membership) -> None:
    least_loaded(members.view(), _REQUEST)


def _times(do: Callable[[], object], change: Callable[[], None], num: int) -> float:
    """Median microseconds of `do`, with changes before each."""
    times = []
    for _ in range(num):
        change()
        started = time.perf_counter()
        do()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def main() -> None:
    """Print the medians and ratios of all pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=500)
    parser.add_argument("--changes", type=int, default=5, help="heartbeats between two attempts")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    configure_logging(LogOptions(log_level="error"), role="benchmark")
    members, workers = _cluster(args.workers)
    numbers = itertools.count()

    def beat() -> None:
        for _ in range(args.changes):
            i = next(numbers)
            members.heartbeat(workers[i % len(workers)], Load(waiting_tokens=1000 + i % 7))

    def hold() -> None:
        """Nothing changes."""

    pairs = {
        "a look, nothing changed": (hold, lambda: _rebuilt(members), members.view),
        "a look after changes": (beat, lambda: _rebuilt(members), members.view),
        "an attempt after changes": (
            beat,
            lambda: _attempt_rebuilt(members),
            lambda: _attempt_cached(members),
        ),
    }
    print(f"{args.workers} workers, {args.changes} heartbeats before each, medians in us")
    for name, (change, rebuilt, cached) in pairs.items():
        rounds = [
            (_times(rebuilt, change, 20), _times(cached, change, 100)) for _ in range(args.rounds)
        ]
        before, after = (statistics.median(r[i] for r in rounds) for i in (0, 1))
        ratios = sorted(r[0] / r[1] for r in rounds)
        print(
            f"{name:26} rebuilt {before:8.1f}  cached {after:7.1f}  ratio"
            f" {statistics.median(ratios):7.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        )


if __name__ == "__main__":
    main()
