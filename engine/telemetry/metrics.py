"""Prometheus metrics, named as vLLM names them with the prefix `diptych_`, so that a dashboard for
vLLM works after one substitution. One registry a process; each class holds the series of one
subject, bound to one model.

Who writes: a worker's engine and data-plane threads (`WorkerMetrics`), the coordinator's loop
(`CoordinatorMetrics`), the gRPC doors of both (`RpcMetrics`). prometheus_client's series are
thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.base.types import KVLink
from engine.telemetry.cache import CacheMetrics

PREFIX = "diptych_"

# Seconds, as in vLLM; single-digit milliseconds were added where a drafted token is that fast.
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
STEP_BUCKETS = (
    0.0001,
    0.0002,
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
)
TOKEN_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class _Maker:
    """Makes series in one registry; one without labels of its own is bound to the model's name."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._model_name = model_name

    def counter(self, name: str, help: str, *labels: str) -> Counter:
        series = Counter(PREFIX + name, help, ("model_name", *labels), registry=self._registry)
        return series.labels(self._model_name) if not labels else series

    def gauge(self, name: str, help: str, *labels: str) -> Gauge:
        series = Gauge(PREFIX + name, help, ("model_name", *labels), registry=self._registry)
        return series.labels(self._model_name) if not labels else series

    def histogram(self, name: str, help: str, buckets: Sequence[float], *labels: str) -> Histogram:
        series = Histogram(
            PREFIX + name,
            help,
            ("model_name", *labels),
            registry=self._registry,
            buckets=tuple(buckets),
        )
        return series.labels(self._model_name) if not labels else series


class ConstraintMetrics:
    """What becomes of constraints that are tried; in both kinds of process."""

    def __init__(self, make: _Maker, model_name: str) -> None:
        self._model_name = model_name
        self._tries = make.counter(
            "constraint_compilations",
            "Constraints tried: compiled, refused, ended at a limit, abandoned or lost.",
            "outcome",
        )

    def tried(self, outcome: str) -> None:
        """Count one; `outcome` is one of the fixed words of checker.py."""
        self._tries.labels(self._model_name, outcome).inc()


class WorkerMetrics:
    """What a prefill or decode worker counts; at most one a registry."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        make = _Maker(registry, model_name)
        self._model_name = model_name
        CacheMetrics(registry)
        self._links = _Links(model_name)
        registry.register(self._links)
        self.num_requests_running = make.gauge("num_requests_running", "Requests in the batch.")
        self.num_requests_waiting = make.gauge("num_requests_waiting", "Requests not yet begun.")
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
        self.generation_tokens = make.counter("generation_tokens", "Tokens of answers.")
        self.num_preemptions = make.counter(
            "num_preemptions", "Requests that gave up their blocks."
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
            "kv_transfer_seconds", "One pull, posted until terminal.", TRANSFER_BUCKETS
        )
        self.kv_stale_reads = make.counter(
            "kv_stale_reads",
            "Blocks that the fence refused: reused before or while they were read.",
        )
        self.kv_checksum_failures = make.counter(
            "kv_checksum_failures", "Blocks that came with other bytes than they were sent with."
        )
        self.kv_data_plane_restarts = make.counter(
            "kv_data_plane_restarts", "New beginnings because reads did not end."
        )
        self._kv_quarantined_blocks = make.gauge(
            "kv_quarantined_blocks", "Held blocks that a failed read may still write."
        )
        self._engine_step_seconds = make.histogram(
            "engine_step_seconds", "A step of the engine, by phase.", STEP_BUCKETS, "phase"
        )
        self.engine_step_failures = make.counter(
            "engine_step_failures", "Steps whose computation raised; their requests were given up."
        )
        self.non_finite_requests = make.counter(
            "non_finite_requests", "Requests given up because what was computed was not finite."
        )
        self._self_tests = make.counter("self_tests", "Self-tests after a fault.", "outcome")
        self.kv_blocks_forgotten = make.counter(
            "kv_blocks_forgotten", "Cached blocks dropped because a sick peer had a part in them."
        )
        self.constraint_masks_late = make.counter(
            "constraint_masks_late", "Steps that an answer stayed out of: its mask was not there."
        )
        self.constraints_too_costly = make.counter(
            "constraints_too_costly", "Answers that ended because their constraint took too long."
        )
        self.iteration_tokens = make.histogram(
            "iteration_tokens_total", "Tokens computed in one step.", TOKEN_BUCKETS
        )
        self._kv_transfer_failures = make.counter(
            "kv_transfer_failures", "Pulls that failed.", "reason"
        )
        self._kv_lease_refusals = make.counter(
            "kv_lease_refusals", "Leases that a caller named and could not use.", "reason"
        )
        self.kv_leases_expired = make.counter(
            "kv_leases_expired", "Leases that ran out: their owner neither renewed nor released."
        )
        self.prefill_refusals = make.counter(
            "prefill_refusals", "Prompts that a prefill worker would not take, computed here."
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
        """Ask for the number of quarantined blocks whenever metrics are read; any thread asks."""
        self._kv_quarantined_blocks.set_function(num_blocks)

    def watch_links(self, links: Callable[[], Sequence[KVLink]]) -> None:
        """Ask for the links to peers whenever metrics are read; any thread asks."""
        self._links.ask = links

    def kv_transfer_failed(self, reason: str) -> None:
        """Count one failed pull; `reason` is one of a few fixed words."""
        self._kv_transfer_failures.labels(self._model_name, reason).inc()

    def kv_lease_refused(self, reason: str, count: int) -> None:
        """Count leases that were unknown (ended or forged), expired, or foreign: another's."""
        self._kv_lease_refusals.labels(self._model_name, reason).inc(count)

    def set_blocks(self, *, free: int, cached: int, held: int) -> None:
        """State of the pool: free + cached + held = total."""
        for state, count in (("free", free), ("cached", cached), ("held", held)):
            self._kv_blocks.labels(self._model_name, state).set(count)
        self.kv_cache_usage_perc.set(held / max(1, free + cached + held))


class _Links(Collector):
    """A series a peer, as long as the peer is remembered."""

    def __init__(self, model_name: str) -> None:
        self.ask: Callable[[], Sequence[KVLink]] = lambda: ()
        self._model_name = model_name

    def describe(self) -> list[Metric]:
        """The name alone: nothing is asked at registration."""
        return [self._family()]

    def collect(self) -> list[Metric]:
        """Measured bytes per second of each peer, with its lane."""
        family = self._family()
        for link in self.ask():
            lane = link.lane or "unknown"
            family.add_metric([self._model_name, link.peer, lane, link.memory], link.bytes_per_s)
        return [family]

    @staticmethod
    def _family() -> GaugeMetricFamily:
        return GaugeMetricFamily(
            PREFIX + "kv_transfer_bytes_per_second",
            "Speed of reads from a peer, smoothed over pulls.",
            labels=("model_name", "peer", "lane", "memory"),
        )


class CoordinatorMetrics:
    """What the coordinator counts; at most one a registry."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        make = _Maker(registry, model_name)
        CacheMetrics(registry)
        self._model_name = model_name
        self.time_to_first_token = make.histogram(
            "time_to_first_token_seconds", "Arrival until the first token.", FIRST_TOKEN_BUCKETS
        )
        self.inter_token_latency = make.histogram(
            "inter_token_latency_seconds", "From one token to the next.", INTER_TOKEN_BUCKETS
        )
        self.e2e_request_latency = make.histogram(
            "e2e_request_latency_seconds", "Arrival until the last message.", REQUEST_BUCKETS
        )
        self.request_queue_time = make.histogram(
            "request_queue_time_seconds", "Admission until a worker began.", REQUEST_BUCKETS
        )
        self.num_requests_running = make.gauge(
            "num_requests_running", "Requests whose answer has begun."
        )
        self.num_requests_waiting = make.gauge(
            "num_requests_waiting", "Admitted requests without a token yet."
        )
        self.prompt_tokens = make.counter("prompt_tokens", "Prompt tokens of admitted requests.")
        self.generation_tokens = make.counter("generation_tokens", "Tokens sent to clients.")
        self._request_success = make.counter(
            "request_success", "Answers that ended well.", "finished_reason"
        )
        self.aborts_refused = make.counter(
            "aborts_refused", "Aborts of requests that came over another connection."
        )
        self._request_failures = make.counter(
            "request_failures", "Requests that ended with an error.", "code"
        )
        self._admission_rejections = make.counter(
            "admission_rejections", "Requests told to come back.", "reason"
        )
        self._migrations = make.counter(
            "migrations", "Requests carried on elsewhere after a worker was lost.", "outcome"
        )
        self.constraints = ConstraintMetrics(make, model_name)
        self._workers = make.gauge("workers", "Workers by role and state.", "role", "state")
        self._worker_sick = make.counter(
            "sick_workers", "Workers that were found to compute wrongly.", "worker"
        )
        self._worker_stalls = make.counter(
            "worker_stalls", "Times that a worker's event loop did not turn for a second.", "worker"
        )
        self._worker_hangs = make.counter(
            "worker_hangs", "Local workers killed because they were silent.", "worker"
        )

    def request_succeeded(self, finished_reason: str) -> None:
        """Count one finished answer: stop, length or aborted."""
        self._request_success.labels(self._model_name, finished_reason).inc()

    def request_failed(self, code: str) -> None:
        """Count one request that ended with gRPC status `code`, in lower case."""
        self._request_failures.labels(self._model_name, code).inc()

    def admission_rejected(self, reason: str) -> None:
        """Count one refused admission: requests or tokens, of tokenize calls too."""
        self._admission_rejections.labels(self._model_name, reason).inc()

    def migrated(self, outcome: str) -> None:
        """Count one attempt to carry a request on.

        resumed, retried (no token yet), exhausted, given_up (it may harm workers), or other_model
        (that of the workers was replaced).
        """
        self._migrations.labels(self._model_name, outcome).inc()

    def worker_sick(self, worker_id: str) -> None:
        """Count one worker that was found to compute wrongly."""
        self._worker_sick.labels(self._model_name, worker_id).inc()

    def worker_stalled(self, worker_id: str) -> None:
        """A worker's event loop did not turn for a second."""
        self._worker_stalls.labels(self._model_name, worker_id).inc()

    def worker_hung(self, worker_id: str) -> None:
        """Count one local worker that was killed because it was silent."""
        self._worker_hangs.labels(self._model_name, worker_id).inc()

    def set_workers(self, role: str, state: str, count: int) -> None:
        """Number of workers of `role` in `state`."""
        self._workers.labels(self._model_name, role, state).set(count)


class RpcMetrics:
    """What a gRPC door counts."""

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
