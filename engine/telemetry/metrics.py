"""Prometheus metrics with vLLM's names and the prefix `diptych_`.

A dashboard for vLLM works after one substitution. One registry a process; each class has the series
of one subject, bound to one model. A worker's engine and data-plane threads write `WorkerMetrics`,
gRPC servers write `RpcMetrics`, the coordinator writes `CoordinatorMetrics`
(coordinator_metrics.py). The series of prometheus_client are thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.base.types import KVLink
from engine.telemetry.cache import CacheMetrics

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


class SeriesFactory:
    """Creates series in one registry, all with the label `model_name`.

    A series without further labels is already bound to the model.
    """

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._model_name = model_name

    def counter(self, name: str, help: str, *labels: str) -> Counter:
        """A counter; `name` has neither prefix nor `_total`."""
        series = Counter(PREFIX + name, help, ("model_name", *labels), registry=self._registry)
        return series.labels(self._model_name) if not labels else series

    def gauge(self, name: str, help: str, *labels: str) -> Gauge:
        """A gauge; `name` has no prefix."""
        series = Gauge(PREFIX + name, help, ("model_name", *labels), registry=self._registry)
        return series.labels(self._model_name) if not labels else series

    def histogram(self, name: str, help: str, buckets: Sequence[float], *labels: str) -> Histogram:
        """A histogram; `name` has no prefix."""
        series = Histogram(
            PREFIX + name,
            help,
            ("model_name", *labels),
            registry=self._registry,
            buckets=tuple(buckets),
        )
        return series.labels(self._model_name) if not labels else series


class ConstraintMetrics:
    """Outcomes of constraint compilations, in coordinators and workers."""

    def __init__(self, make: SeriesFactory, model_name: str) -> None:
        self._model_name = model_name
        self._tries = make.counter(
            "constraint_compilations",
            "Constraint compilations by outcome: compiled, refused, a limit, abandoned or lost.",
            "outcome",
        )

    def tried(self, outcome: str) -> None:
        """Count one compilation; `outcome` is one of those of checker.py."""
        self._tries.labels(self._model_name, outcome).inc()


class WorkerMetrics:
    """Metrics of a prefill or decode worker; at most one instance a registry."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        make = SeriesFactory(registry, model_name)
        self._model_name = model_name
        CacheMetrics(registry)
        self._links = _Links(model_name)
        registry.register(self._links)
        self.num_requests_running = make.gauge("num_requests_running", "Requests in the batch.")
        self.num_requests_waiting = make.gauge("num_requests_waiting", "Requests not yet started.")
        self.kv_cache_usage_perc = make.gauge(
            "kv_cache_usage_perc", "Held share of the KV pool; 1 is all of it."
        )
        self.prefix_cache_queries = make.counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache."
        )
        self.prefix_cache_hits = make.counter(
            "prefix_cache_hits", "Prompt tokens found in the prefix cache."
        )
        self.prompt_tokens = make.counter("prompt_tokens", "Prompt tokens computed.")
        self.generation_tokens = make.counter("generation_tokens", "Tokens of outputs.")
        self.num_preemptions = make.counter(
            "num_preemptions", "Preempted requests, which lose their blocks."
        )
        self.spec_decode_num_drafts = make.counter("spec_decode_num_drafts", "Drafts proposed.")
        self.spec_decode_num_draft_tokens = make.counter(
            "spec_decode_num_draft_tokens", "Draft tokens proposed."
        )
        self.spec_decode_num_accepted_tokens = make.counter(
            "spec_decode_num_accepted_tokens", "Draft tokens accepted."
        )
        self.kv_transfer_blocks = make.counter("kv_transfer_blocks", "KV blocks pulled from peers.")
        self.kv_transfer_bytes = make.counter("kv_transfer_bytes", "Bytes pulled from peers.")
        self.kv_transfer_seconds = make.histogram(
            "kv_transfer_seconds", "One pull, from posted to terminal.", TRANSFER_BUCKETS
        )
        self.kv_stale_reads = make.counter(
            "kv_stale_reads", "Blocks rejected by the fence: reused before or during the read."
        )
        self.kv_checksum_failures = make.counter(
            "kv_checksum_failures", "Blocks that arrived with a wrong checksum."
        )
        self.kv_data_plane_restarts = make.counter(
            "kv_data_plane_restarts", "Restarts of the data plane because reads did not end."
        )
        self._kv_quarantined_blocks = make.gauge(
            "kv_quarantined_blocks", "Held blocks that a failed read may still write."
        )
        self._engine_step_seconds = make.histogram(
            "engine_step_seconds", "A step of the engine, by phase.", STEP_BUCKETS, "phase"
        )
        self.engine_step_failures = make.counter(
            "engine_step_failures", "Steps whose computation raised; their requests failed."
        )
        self.non_finite_requests = make.counter(
            "non_finite_requests", "Requests that failed because of numbers that are not finite."
        )
        self._self_tests = make.counter("self_tests", "Self-tests after a fault.", "outcome")
        self.kv_blocks_forgotten = make.counter(
            "kv_blocks_forgotten", "Cached blocks dropped because they depend on a sick peer."
        )
        self.constraint_masks_late = make.counter(
            "constraint_masks_late", "Steps that an output missed because its mask was late."
        )
        self.constraints_too_costly = make.counter(
            "constraints_too_costly", "Outputs that ended because their constraint took too long."
        )
        self.iteration_tokens = make.histogram(
            "iteration_tokens_total", "Tokens computed in one step.", TOKEN_BUCKETS
        )
        self._kv_transfer_failures = make.counter(
            "kv_transfer_failures", "Pulls that failed.", "reason"
        )
        self._kv_lease_refusals = make.counter(
            "kv_lease_refusals", "Leases that a peer requested and may not use.", "reason"
        )
        self.kv_leases_expired = make.counter(
            "kv_leases_expired", "Leases that expired without renewal or release."
        )
        self.prefill_refusals = make.counter(
            "prefill_refusals", "Prompts that a prefill worker refused, computed here."
        )
        self.constraints = ConstraintMetrics(make, model_name)
        self._phases: dict[str, Histogram] = {}
        self._kv_blocks = make.gauge("kv_blocks", "KV blocks by state.", "state")

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
            self._kv_blocks.labels(self._model_name, state).set(count)
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
