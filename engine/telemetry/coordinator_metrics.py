"""Prometheus metrics of a coordinator; see metrics.py."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from engine.telemetry.cache import CacheMetrics
from engine.telemetry.metrics import (
    FIRST_TOKEN_BUCKETS,
    INTER_TOKEN_BUCKETS,
    REQUEST_BUCKETS,
    ConstraintMetrics,
    SeriesFactory,
)


class CoordinatorMetrics:
    """Metrics of a coordinator; at most one instance a registry."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        make = SeriesFactory(registry, model_name)
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
            "request_queue_time_seconds", "Admission until a worker starts.", REQUEST_BUCKETS
        )
        self.num_requests_running = make.gauge(
            "num_requests_running", "Requests that have a token."
        )
        self.num_requests_waiting = make.gauge(
            "num_requests_waiting", "Admitted requests without a token yet."
        )
        self.prompt_tokens = make.counter("prompt_tokens", "Prompt tokens of admitted requests.")
        self.generation_tokens = make.counter("generation_tokens", "Tokens sent to clients.")
        self._request_success = make.counter(
            "request_success", "Outputs that ended without error.", "finished_reason"
        )
        self.aborts_refused = make.counter(
            "aborts_refused", "Aborts of requests of other connections."
        )
        self._request_failures = make.counter(
            "request_failures", "Requests that ended with an error.", "code"
        )
        self._admission_rejections = make.counter(
            "admission_rejections", "Requests refused with a retry time.", "reason"
        )
        self._migrations = make.counter(
            "migrations", "Requests continued elsewhere after a worker was lost.", "outcome"
        )
        self.constraints = ConstraintMetrics(make, model_name)
        self._workers = make.gauge("workers", "Workers by role and state.", "role", "state")
        self._worker_sick = make.counter(
            "sick_workers", "Workers that computed wrong numbers.", "worker"
        )
        self._worker_stalls = make.counter(
            "worker_stalls", "Stalls of a worker's event loop of a second or more.", "worker"
        )
        self._worker_hangs = make.counter(
            "worker_hangs", "Local workers killed because they were silent.", "worker"
        )

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
        self._worker_sick.labels(self._model_name, worker_id).inc()

    def worker_stalled(self, worker_id: str) -> None:
        """Count one stall of a worker's event loop."""
        self._worker_stalls.labels(self._model_name, worker_id).inc()

    def worker_hung(self, worker_id: str) -> None:
        """Count one local worker that was killed because it was silent."""
        self._worker_hangs.labels(self._model_name, worker_id).inc()

    def set_workers(self, role: str, state: str, count: int) -> None:
        """Set the number of workers of `role` in `state`."""
        self._workers.labels(self._model_name, role, state).set(count)
