"""A coordinator: the public gRPC server, that of workers, HTTP, the table and the pipeline.

    start() -> serving -> drain() (no new requests, those inside finish) -> end_requests() -> stop()

Made, used and ended in one event loop.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from typing import Any

from google.protobuf import descriptor_pool
from prometheus_client import CollectorRegistry
from starlette.routing import BaseRoute

from coordinator.api.frontend import Frontend
from coordinator.api.grpc.admin import AdminServicer
from coordinator.api.grpc.responses import alive
from coordinator.api.grpc.service import InferenceServicer
from coordinator.api.oip.service import OipServicer
from coordinator.api.openai.api import OpenAiApi
from coordinator.api.openai.cors import with_cors
from coordinator.api.switches import Switches
from coordinator.api.vllm.service import VllmEngineServicer
from coordinator.cluster.auth import Trust
from coordinator.cluster.membership import Membership
from coordinator.cluster.registry_service import RegistryServicer
from coordinator.generation.choice import ChoiceRunner
from coordinator.generation.pipeline import Pipeline
from coordinator.routing.admission import Admission
from coordinator.routing.policy import POLICIES
from coordinator.text.served_model import ServedModel
from engine.base.holds import holds_as_json
from engine.base.memory import host_memory
from engine.base.option_groups import FrontOptions
from engine.base.types import Role
from engine.http.guard import refusals_counter
from engine.http.holds import holds_route
from engine.http.server import HttpServer, make_app, serve_http
from engine.rpc.channel import MAX_REQUEST_BYTES
from engine.rpc.receive_budget import ReceiveBudget
from engine.rpc.server import RpcServer
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from engine.telemetry.metrics import RpcMetrics

# The pipeline ends a call without a deadline; this is for a client that stopped reading.
_STUCK_S = 10.0
_LEAST_IN_FLIGHT, _MOST_IN_FLIGHT = 128 << 20, 2 << 30  # bytes of requests
_service = descriptor_pool.Default().FindServiceByName
_STATUS_S = 1.0  # for the statuses of requests that are cut off


class Coordinator:
    """The servers of one coordinator. Made, started and stopped in one event loop."""

    def __init__(self, front: FrontOptions, model: ServedModel, trust: Trust | None = None) -> None:
        self.trust = trust = trust or Trust()
        self._front = front
        self._switches = Switches(front.disable)
        self.model = model
        self.registry = CollectorRegistry()
        self.metrics = metrics = CoordinatorMetrics(self.registry, model.name)
        self.membership = Membership(
            model.name, model.limits.vocab_size, metrics, tokenizer_digest=model.tokenizer_digest
        )
        self.membership.penalty_s = front.worker_penalty_s
        if model.checker:
            model.checker.count = metrics.constraints.tried
        self._admission = Admission(front.max_queued_requests, front.max_queued_tokens, metrics)
        choices = ChoiceRunner(
            model,
            self.membership,
            metrics,
            worker_wait_s=front.worker_wait_s,
            policy=POLICIES[front.routing],
            token=trust.cluster,
        )
        self.pipeline = Pipeline(model, self.membership, self._admission, metrics, choices)
        self._tokenizing = Admission(
            front.max_queued_requests, front.max_queued_tokens, metrics, what="tokenize"
        )
        self._frontend = Frontend(
            served=model,
            pipeline=self.pipeline,
            membership=self.membership,
            metrics=metrics,
            max_request_s=front.max_request_s,
            tokenizing=self._tokenizing,
            switches=self._switches,
        )
        rpc_metrics = RpcMetrics(self.registry)
        # A half each, so that bodies keep no messages out, nor messages bodies.
        half = (front.max_request_bytes_in_flight or _bytes_in_flight()) // 2
        self._budget, self._http_budget = (
            ReceiveBudget(half, lambda: metrics.admission_rejected("bytes")) for _ in range(2)
        )
        reflection = self._switches.serves("reflection")
        self._public = RpcServer(
            rpc_metrics,
            client_timeout_s=front.client_timeout_s,
            max_request_bytes=MAX_REQUEST_BYTES,
            budget=self._budget,
            reflection=reflection,
        )
        self._internal = self._public
        if front.internal_listen:
            self._internal = RpcServer(rpc_metrics, budget=self._budget, reflection=reflection)
        self._servers = dict.fromkeys((self._public, self._internal))  # one, or two
        self._add_services()
        self._speak_other_protocols(metrics)
        self._http: HttpServer | None = None
        self.address = front.listen
        self.internal_address = front.internal_listen or front.listen
        self.http_address = front.http

    def _add_services(self) -> None:
        """Diptych's own: inference and administration in public, the registry for workers."""
        limit_s = self._front.max_request_s + _STUCK_S
        inference = InferenceServicer(self._frontend)
        self._public.add_service(
            _service("diptych.v1.InferenceService"), inference, limit_s=limit_s, alive=alive
        )
        workers = RegistryServicer(self.membership, f"coordinator-{secrets.token_hex(4)}")
        operator, token = AdminServicer(self.membership, workers), self.trust.operator
        admin = _service("diptych.v1.AdminService")
        self._public.add_service(admin, operator, token=token, guarded={"DrainWorker"})
        registry = _service("diptych.internal.v1.RegistryService")
        # Streams of workers stay open, and must not end for lack of room.
        self._internal.add_service(registry, workers, token=self.trust.cluster, is_counted=False)

    @property
    def ready(self) -> bool:
        """Whether a request would find a decode worker."""
        return not self.pipeline.draining and self.membership.ready(Role.DECODE)

    async def start(self) -> None:
        """Listen on all addresses. Raises ConfigError where one is in use."""
        self.address = _with_port(self._front.listen, self._public.listen(self._front.listen))
        self.internal_address = self.address
        if self._internal is not self._public:
            port = self._internal.listen(self._front.internal_listen)
            self.internal_address = _with_port(self._front.internal_listen, port)
        refused = refusals_counter(self.registry)
        routes: list[BaseRoute] = [holds_route(self._holds, self.trust.operator, refused)]
        if self._switches.serves("openai"):
            openai = OpenAiApi(
                self._frontend,
                self.registry,
                limit_s=self._front.max_request_s + _STUCK_S,
                sse_keepalive_s=self._front.sse_keepalive_s,
                budget=self._http_budget,
            )
            routes += openai.routes()
        app = make_app(self.registry, lambda: self.ready, routes)
        self._http = await serve_http(
            with_cors(app, self._front.cors_origins),
            self._front.http,
            client_timeout_s=self._front.client_timeout_s,
            keepalive_s=self._front.http_keepalive_s,
            grpc_port=int(self.address.rpartition(":")[2]),
            allowed_hosts=self._front.allowed_hosts,
            origins=self._front.cors_origins,
            refused=refused,
        )
        self.http_address = self._http.address
        for server in self._servers:
            await server.start()

    async def _holds(self) -> dict[str, Any]:
        """The response of /debug/holds."""
        holds = [*self._admission.holds(), *self._tokenizing.holds()]
        return {"process": {"role": "coordinator"}, "holds": holds_as_json(holds)}

    def _speak_other_protocols(self, metrics: CoordinatorMetrics) -> None:
        """Serve the protocols of Triton and KServe, and of gateways in front of vLLM."""
        limit_s = self._front.max_request_s
        frontend, ready = self._frontend, lambda: self.ready
        if self._switches.serves("oip"):
            oip = OipServicer(self.model.name, frontend, metrics, ready, limit_s)
            # No limit on its streams, which clients keep; each request of one has its own.
            self._public.add_service(_service("inference.GRPCInferenceService"), oip)
        if self._switches.serves("engine-protocol"):
            engine = VllmEngineServicer(self.model, frontend, self.pipeline, metrics, ready)
            name = "vllm.grpc.engine.VllmEngine"
            self._public.add_service(_service(name), engine, limit_s=limit_s + _STUCK_S)

    async def drain(self, deadline_s: float) -> bool:
        """Refuse new requests and wait for those inside; False: some are left at the deadline."""
        self.pipeline.draining = True
        await self._public.set_serving(False)
        try:
            await asyncio.wait_for(self.pipeline.idle.wait(), deadline_s)
        except TimeoutError:
            return False
        return True

    async def end_requests(self) -> None:
        """End the requests inside; the status has the number of tokens, so clients can resume."""
        await self.pipeline.close()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.pipeline.idle.wait(), _STATUS_S)

    async def stop(self) -> None:
        """End everything; calls that still run are cancelled."""
        await self.end_requests()
        for server in self._servers:
            await server.stop()
        if self._http:
            await self._http.stop()
        self.model.close()


def _bytes_in_flight() -> int:
    """Memory for requests that are received: a share of the machine's, or of the cgroup's."""
    share = host_memory().available_bytes // 8
    return min(max(share, _LEAST_IN_FLIGHT), _MOST_IN_FLIGHT)


def dialable(address: str) -> str:
    """An address at which this machine reaches what listens on `address`, wildcards included."""
    host, _, port = address.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    return f"{host}:{port}"


def _with_port(address: str, port: int) -> str:
    return f"{address.rpartition(':')[0]}:{port}"
