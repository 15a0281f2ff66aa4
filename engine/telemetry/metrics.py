"""Prometheus metrics with vLLM's names and the prefix `diptych_`.

A dashboard for vLLM works after one substitution. One registry a process; each class has the series
of one subject, bound to one model. A worker's engine and data-plane threads write `WorkerMetrics`,
gRPC servers write `RpcMetrics`, the coordinator writes `CoordinatorMetrics`
(coordinator_metrics.py). The series of prometheus_client are thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.base.types import KVLink
from engine.telemetry.cache import show_damaged

PREFIX = "diptych_"

# Seconds; vLLM's buckets, with single-digit milliseconds added, as drafted tokens are that fast.
# fmt: off
FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)
INTER_TOKEN_BUCKETS = (
    0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
)
TRANSFER_BUCKETS = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
    10.0, 30.0,
)
# fmt: on
STEP_BUCKETS = TRANSFER_BUCKETS[:-1]
TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class _Series:
    kind: Callable[..., Any]
    help: str
    labels: tuple[str, ...]
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


def counter(help: str, *labels: str) -> Counter:
    """Declares a counter, whose name gets the suffix `_total`."""
    return cast(Counter, _Series(Counter, help, labels))


def gauge(help: str, *labels: str) -> Gauge:
    """Declares a gauge."""
    return cast(Gauge, _Series(Gauge, help, labels))


def histogram(help: str, buckets: Sequence[float], *labels: str, name: str = "") -> Histogram:
    """Declares a histogram; `name`: where it is not the attribute's."""
    series = _Series(Histogram, help, labels, name, {"buckets": tuple(buckets)})
    return cast(Histogram, series)


class SeriesSet:
    """Series of one model in one registry, declared as attributes of a class.

    A series has the attribute's name, without a leading underscore, and the label `model_name`. One
    without further labels is already bound to the model.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._model_name = model_name
        for attribute, series in vars(type(self)).items():
            if isinstance(series, _Series):
                name = PREFIX + (series.name or attribute.removeprefix("_"))
                labels = ("model_name", *series.labels)
                made = series.kind(name, series.help, labels, registry=registry, **series.options)
                setattr(self, attribute, made if series.labels else made.labels(model_name))


class ConstraintMetrics(SeriesSet):
    """Outcomes of constraint compilations, in coordinators and workers."""

    _constraint_compilations = counter(
        "Constraint compilations by outcome: compiled, refused, a limit, abandoned or lost.",
        "outcome",
    )

    def tried(self, outcome: str) -> None:
        """Count one compilation; `outcome` is one of those of checker.py."""
        self._constraint_compilations.labels(self._model_name, outcome).inc()


class WorkerMetrics(SeriesSet):
    """Metrics of a prefill or decode worker; at most one instance a registry."""

    num_requests_running = gauge("Requests in the batch.")
    num_requests_waiting = gauge("Requests not yet started.")
    kv_cache_usage_perc = gauge("Held share of the KV pool; 1 is all of it.")
    prefix_cache_queries = counter("Prompt tokens looked up in the prefix cache.")
    prefix_cache_hits = counter("Prompt tokens found in the prefix cache.")
    prompt_tokens = counter("Prompt tokens computed.")
    generation_tokens = counter("Tokens of outputs.")
    num_preemptions = counter("Preempted requests, which lose their blocks.")
    spec_decode_num_drafts = counter("Drafts proposed.")
    spec_decode_num_draft_tokens = counter("Draft tokens proposed.")
    spec_decode_num_accepted_tokens = counter("Draft tokens accepted.")
    kv_transfer_blocks = counter("KV blocks pulled from peers.")
    kv_transfer_bytes = counter("Bytes pulled from peers.")
    kv_transfer_seconds = histogram("One pull, from posted to terminal.", TRANSFER_BUCKETS)
    kv_stale_reads = counter("Blocks rejected by the fence: reused before or during the read.")
    kv_checksum_failures = counter("Blocks that arrived with a wrong checksum.")
    kv_data_plane_restarts = counter("Restarts of the data plane because reads did not end.")
    _kv_quarantined_blocks = gauge("Held blocks that a failed read may still write.")
    _engine_step_seconds = histogram("A step of the engine, by phase.", STEP_BUCKETS, "phase")
    engine_step_failures = counter("Steps whose computation raised; their requests failed.")
    non_finite_requests = counter("Requests that failed because of numbers that are not finite.")
    _self_tests = counter("Self-tests after a fault.", "outcome")
    kv_blocks_forgotten = counter("Cached blocks dropped because they depend on a sick peer.")
    constraint_masks_late = counter("Steps that an output missed because its mask was late.")
    constraints_too_costly = counter("Outputs that ended because their constraint took too long.")
    iteration_tokens = histogram(
        "Tokens computed in one step.", TOKEN_BUCKETS, name="iteration_tokens_total"
    )
    _kv_transfer_failures = counter("Pulls that failed.", "reason")
    _kv_lease_refusals = counter("Leases that a peer requested and may not use.", "reason")
    kv_leases_expired = counter("Leases that expired without renewal or release.")
    prefill_refusals = counter("Prompts that a prefill worker refused, computed here.")
    _kv_blocks = gauge("KV blocks by state.", "state")

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        super().__init__(registry, model_name)
        show_damaged(registry)
        self._links = _Links(model_name)
        registry.register(self._links)
        self.constraints = ConstraintMetrics(registry, model_name)
        self._phases: dict[str, Histogram] = {}
        self._block_states = {
            state: self._kv_blocks.labels(model_name, state) for state in ("free", "cached", "held")
        }

    def step_took(self, phases: Mapping[str, float]) -> None:
        """Observe the seconds of each phase of one step; "total" is their sum."""
        for phase, seconds in (*phases.items(), ("total", sum(phases.values()))):
            if phase not in self._phases:
                self._phases[phase] = self._engine_step_seconds.labels(self._model_name, phase)
            self._phases[phase].observe(seconds)

    def self_tested(self, outcome: str) -> None:
        """Count one self-test after a fault: passed or failed."""
        self._self_tests.labels(self._model_name, outcome).inc()

    def watch_quarantine(self, num_blocks: Callable[[], int]) -> None:
        """Call `num_blocks` when metrics are read, from any thread."""
        self._kv_quarantined_blocks.set_function(num_blocks)

    def watch_links(self, links: Callable[[], Sequence[KVLink]]) -> None:
        """Call `links` when metrics are read, from any thread."""
        self._links.links = links

    def kv_transfer_failed(self, reason: str) -> None:
        """Count one failed pull; `reason` is one of a few fixed values."""
        self._kv_transfer_failures.labels(self._model_name, reason).inc()

    def kv_lease_refused(self, reason: str, count: int) -> None:
        """Count leases that are unknown (ended or forged), expired, or foreign (another peer's)."""
        self._kv_lease_refusals.labels(self._model_name, reason).inc(count)

    def set_blocks(self, *, free: int, cached: int, held: int) -> None:
        """Set the number of blocks in each state: free + cached + held = total."""
        for state, count in (("free", free), ("cached", cached), ("held", held)):
            self._block_states[state].set(count)
        self.kv_cache_usage_perc.set(held / max(1, free + cached + held))


class _Links(Collector):
    """One series a peer, as long as `links` returns the peer."""

    def __init__(self, model_name: str) -> None:
        self.links: Callable[[], Sequence[KVLink]] = lambda: ()
        self._model_name = model_name

    def describe(self) -> list[Metric]:
        """The metric without samples, so that registration does not call `links`."""
        return [self._family()]

    def collect(self) -> list[Metric]:
        """Measured bytes per second of each peer, with its lane."""
        family = self._family()
        for link in self.links():
            lane = link.lane or "unknown"
            family.add_metric(
                [self._model_name, link.worker_id, lane, link.memory], link.bytes_per_s
            )
        return [family]

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily(
            PREFIX + "kv_transfer_bytes_per_second",
            "Speed of reads from a peer, smoothed over pulls.",
            labels=("model_name", "peer", "lane", "memory"),
        )


class RpcMetrics:
    """Metrics of a gRPC server."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._failures = Counter(
            PREFIX + "rpc_failures",
            "Calls that ended with an error.",
            ("method", "code"),
            registry=registry,
        )

    def failed(self, method: str, code: str) -> None:
        """Count one failed call of `method` (`Service/Method`)."""
        self._failures.labels(method, code).inc()
