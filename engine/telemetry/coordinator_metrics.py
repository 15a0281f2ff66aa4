"""Prometheus metrics of a coordinator; see metrics.py."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from engine.telemetry.cache import show_damaged
from engine.telemetry.metrics import (
    FIRST_TOKEN_BUCKETS,
    INTER_TOKEN_BUCKETS,
    REQUEST_BUCKETS,
    ConstraintMetrics,
    SeriesSet,
    counter,
    gauge,
    histogram,
)


class CoordinatorMetrics(SeriesSet):
    """Metrics of a coordinator; at most one instance a registry."""

    time_to_first_token_seconds = histogram("Arrival until the first token.", FIRST_TOKEN_BUCKETS)
    inter_token_latency_seconds = histogram("From one token to the next.", INTER_TOKEN_BUCKETS)
    e2e_request_latency_seconds = histogram("Arrival until the last message.", REQUEST_BUCKETS)
    request_queue_time_seconds = histogram("Admission until a worker starts.", REQUEST_BUCKETS)
    num_requests_running = gauge("Requests that have a token.")
    num_requests_waiting = gauge("Admitted requests without a token yet.")
    prompt_tokens = counter("Prompt tokens of admitted requests.")
    generation_tokens = counter("Tokens sent to clients.")
    _request_success = counter("Outputs that ended without error.", "finished_reason")
    aborts_refused = counter("Aborts of requests of other connections.")
    _request_failures = counter("Requests that ended with an error.", "code")
    _admission_rejections = counter("Requests refused with a retry time.", "reason")
    _migrations = counter("Requests continued elsewhere after a worker was lost.", "outcome")
    _workers = gauge("Workers by role and state.", "role", "state")
    _sick_workers = counter("Workers that computed wrong numbers.", "worker")
    _worker_stalls = counter("Stalls of a worker's event loop of a second or more.", "worker")
    _worker_hangs = counter("Local workers killed because they were silent.", "worker")

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        super().__init__(registry, model_name)
        show_damaged(registry)
        self.constraints = ConstraintMetrics(registry, model_name)

    def request_succeeded(self, finished_reason: str) -> None:
        """Count one finished output: stop, length or aborted."""
        self._request_success.labels(self._model_name, finished_reason).inc()

    def request_failed(self, code: str) -> None:
        """Count one request that ended with gRPC status `code`, in lower case."""
        self._request_failures.labels(self._model_name, code).inc()

    def admission_rejected(self, reason: str) -> None:
        """Count one refused admission; `reason`: requests or tokens. Includes Tokenize calls."""
        self._admission_rejections.labels(self._model_name, reason).inc()

    def migrated(self, outcome: str) -> None:
        """Count one attempt to continue a request.

        resumed, retried (no token yet), exhausted, given_up (it may harm workers), or other_model
        (the workers have another model now).
        """
        self._migrations.labels(self._model_name, outcome).inc()

    def worker_sick(self, worker_id: str) -> None:
        """Count one worker that computed wrong numbers."""
        self._sick_workers.labels(self._model_name, worker_id).inc()

    def worker_stalled(self, worker_id: str) -> None:
        """Count one stall of a worker's event loop."""
        self._worker_stalls.labels(self._model_name, worker_id).inc()

    def worker_hung(self, worker_id: str) -> None:
        """Count one local worker that was killed because it was silent."""
        self._worker_hangs.labels(self._model_name, worker_id).inc()

    def set_workers(self, role: str, state: str, count: int) -> None:
        """Set the number of workers of `role` in `state`."""
        self._workers.labels(self._model_name, role, state).set(count)
