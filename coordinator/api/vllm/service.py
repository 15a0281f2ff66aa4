"""The protocol between gateways and vLLM: a coordinator acts as one engine.

Tokens in, tokens out. A thin translation to the frontend:

    Generate --task--> events -> chunks -> complete (one a choice)
                 ^
    Abort(ids) --'  the task ends, and what is unfinished completes as "abort"

An abort ends requests of its own connection only, since clients choose the ids and several clients
reach one coordinator. A gateway sends both over one connection.

Owned by the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from coordinator.api.frontend import Frontend
from coordinator.api.values import GenerateRequest
from coordinator.api.vllm.request import to_generate
from coordinator.api.vllm.responses import ResponseBuilder
from coordinator.generation.events import Event
from coordinator.generation.fan_in import Merge
from coordinator.generation.pipeline import Pipeline
from coordinator.text.served_model import ServedModel
from engine.pb.vllm import vllm_engine_pb2 as pb
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from engine.telemetry.log import get_logger

_log = get_logger(__name__)

_MAX_LOGGED = 8  # ids of one refused abort
_SERVER_TYPE = "vllm-grpc"  # as the protocol names its servers

Responses = AsyncGenerator[pb.GenerateResponse, None]


@dataclass(eq=False)
class VllmEngineServicer:
    """See vllm_engine.proto. `ready`: whether a decode worker is ready."""

    model: ServedModel
    frontend: Frontend
    pipeline: Pipeline
    metrics: CoordinatorMetrics
    ready: Callable[[], bool]
    clock: Callable[[], float] = time.time
    _last_request: float = 0.0
    # By connection and id; several requests of one connection may have one id.
    _running: dict[tuple[str, str], set[asyncio.Task[None]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._started = self.clock()

    # Method names are the wire's.
    async def Generate(self, request: pb.GenerateRequest, context: Any) -> Responses:
        """Complete a prompt."""
        self._last_request = self.clock()
        generate = to_generate(request, self.model.name, self.pipeline.max_model_len)
        builder = ResponseBuilder(request)
        events: Merge[Event] = Merge()
        async with events:
            task = events.add(self._run(generate, context, events))
            with self._abortable((context.peer(), request.request_id), task):
                async for event in events:
                    for response in builder.add(event):
                        yield response
        if task.cancelled():
            _log.info("request aborted by its gateway", request_id=request.request_id)
            for response in builder.abort():
                yield response

    async def HealthCheck(self, request: Any, context: Any) -> pb.HealthCheckResponse:
        """Whether a decode worker is ready."""
        ready = self.ready()
        message = "ready" if ready else "no decode worker is ready, or this coordinator is draining"
        return pb.HealthCheckResponse(healthy=ready, message=message)

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        """End requests of this connection by id; other ids are ignored."""
        requested, peer = set(request.request_ids), context.peer()
        foreign = set()
        for (owner, request_id), tasks in self._running.items():
            if request_id in requested and owner != peer:
                foreign.add(request_id)
            elif request_id in requested:
                for task in tasks:
                    task.cancel()
        if foreign:
            self.metrics.aborts_refused.inc(len(foreign))
            ids = sorted(foreign)[:_MAX_LOGGED]
            _log.warning("abort refused: requests of other connections", peer=peer, request_ids=ids)
        return pb.AbortResponse()

    async def GetModelInfo(self, request: Any, context: Any) -> pb.GetModelInfoResponse:
        """The served model."""
        model, limit = self.model, self.pipeline.max_model_len
        folder = str(model.folder) if model.folder else model.name
        return pb.GetModelInfoResponse(
            model_path=folder,
            tokenizer_path=folder,
            is_generation=True,
            served_model_name=model.name,
            max_context_length=limit,
            max_req_input_len=limit,
            vocab_size=model.limits.vocab_size,
            architectures=[model.config.architecture],
            eos_token_ids=model.limits.eos_token_ids,
            bos_token_id=model.config.bos_token_id,
        )

    async def GetServerInfo(self, request: Any, context: Any) -> pb.GetServerInfoResponse:
        """The state of the cluster as one engine of one rank."""
        return pb.GetServerInfoResponse(
            active_requests=self.pipeline.num_requests,
            is_paused=self.pipeline.draining,
            last_receive_timestamp=self._last_request,
            uptime_seconds=self.clock() - self._started,
            server_type=_SERVER_TYPE,
            data_parallel_size=1,
            block_size=self.frontend.model().block_size,
        )

    async def _run(self, request: GenerateRequest, context: Any, events: Merge[Event]) -> None:
        async with aclosing(self.frontend.generate(request, context.time_remaining())) as answers:
            async for event in answers:
                await events.put(event)

    @contextmanager
    def _abortable(self, key: tuple[str, str], task: asyncio.Task[None]) -> Iterator[None]:
        """While inside, Abort finds the task."""
        self._running.setdefault(key, set()).add(task)
        try:
            yield
        finally:
            tasks = self._running[key]
            tasks.discard(task)
            if not tasks:
                del self._running[key]
