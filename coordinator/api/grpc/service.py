"""InferenceService and AdminService: public messages <-> the pipeline, checked here and once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict
from typing import Any

from coordinator.api.grpc.responses import response
from coordinator.api.switches import Switches
from coordinator.api.validation.request import (
    MAX_CHOICES,
    MAX_DETOKENIZED,
    check_messages,
    check_model,
    check_token_ids,
    validate_chat,
    validate_generate,
)
from coordinator.api.validation.tools import check_tools
from coordinator.cluster.membership import Membership
from coordinator.cluster.registry_service import RegistryServicer
from coordinator.cluster.worker import Worker, WorkerState
from coordinator.generation.pipeline import Pipeline
from coordinator.generation.request import Finished, GenerationRequest, Part, PromptPart
from coordinator.routing.admission import Admission
from coordinator.text.served_model import Limits, ServedModel
from engine.base.errors import DeadlineExceeded, DiptychError, InvalidRequest, NotFound
from engine.base.options import MAX_REQUEST_S
from engine.base.types import Health, KVLink, Role
from engine.pb.diptych.v1 import admin_pb2, inference_pb2
from engine.rpc.status import to_status
from engine.telemetry.log import bind_request, get_logger
from engine.telemetry.metrics import CoordinatorMetrics
from engine.telemetry.timeline import Event, Timeline

_log = get_logger(__name__)

_AT_ONCE = 4 << 10  # characters or elements checked on the event loop: half a millisecond
_TOKENIZING_AT_ONCE = 2  # of the tokenizer's threads: the others are for requests
_CHARS_A_TOKEN = 4  # about: what a text counts as before it is tokenized
_WORKERS_OWN_S = 120.0  # a drain whose deadline only the worker knows is waited for so long
_END_S = 15.0  # from the end of a worker's requests to its own

Responses = AsyncGenerator[inference_pb2.GenerateResponse, None]


class InferenceServicer:
    """The public API; see inference.proto."""

    def __init__(
        self,
        model: ServedModel,
        pipeline: Pipeline,
        membership: Membership,
        metrics: CoordinatorMetrics,
        *,
        max_request_s: float,
        tokenizing: Admission | None = None,
        switches: Switches | None = None,
    ) -> None:
        """`tokenizing` bounds calls of Tokenize and Detokenize, apart from requests."""
        self._tokenizing = tokenizing
        self._switches = switches or Switches()
        self._slots = asyncio.Semaphore(_TOKENIZING_AT_ONCE)
        self._model = model
        self._pipeline = pipeline
        self._membership = membership
        self._metrics = metrics
        self._max_request_s = max_request_s

    # Method names are the wire's.
    def Generate(self, request: inference_pb2.GenerateRequest, context: Any) -> Responses:
        """Complete a prompt."""
        return self._serve(validate_generate, request, context)

    def Chat(self, request: inference_pb2.ChatRequest, context: Any) -> Responses:
        """Complete a conversation."""
        return self._serve(validate_chat, request, context)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.TokenizeResponse:
        """Token ids of a text or of a rendered conversation."""
        limits = self._model.limits
        check_model(request.model, limits)
        limit = self._pipeline.max_model_len
        match request.WhichOneof("input"):
            case "text":
                special = request.add_special_tokens or not request.HasField("add_special_tokens")
                async with self._admitted(len(request.text) // _CHARS_A_TOKEN, context):
                    ids = await self._model.encode("text", request.text, special, limit)
            case "chat":
                chat = request.chat
                self._switches.check_tools("chat.tools_json", bool(chat.tools_json))
                size = len(chat.tools_json) + sum(len(m.content) for m in chat.messages)
                async with self._admitted(size // _CHARS_A_TOKEN, context):
                    messages = check_messages("chat.messages", chat.messages, limits)
                    tools = await asyncio.to_thread(check_tools, "chat.tools_json", chat.tools_json)
                    ask = chat.add_generation_prompt or not chat.HasField("add_generation_prompt")
                    ids = await self._model.encode_chat(
                        messages, limit, tools, ask, "chat.messages"
                    )
            case _:
                raise InvalidRequest("input", "unset; expected text or chat")
        return inference_pb2.TokenizeResponse(token_ids=ids, max_model_len=limit)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.DetokenizeResponse:
        """Text of token ids."""
        limits = self._model.limits
        check_model(request.model, limits)
        async with self._admitted(len(request.token_ids), context):
            ids = check_token_ids("token_ids", request.token_ids, limits, MAX_DETOKENIZED)
            text = await self._model.decode(ids, request.skip_special_tokens)
        return inference_pb2.DetokenizeResponse(text=text)

    @asynccontextmanager
    async def _admitted(self, num_tokens: int, context: Any) -> AsyncIterator[None]:
        """While a text of about `num_tokens` is tokenized, or the like. Raises Overloaded."""
        if self._tokenizing is None:
            yield
            return
        left_s = context.time_remaining()
        limit_s = self._max_request_s if left_s is None else left_s
        ticket = self._tokenizing.admit(deadline_s=time.monotonic() + limit_s)
        try:
            ticket.set_tokens(max(1, num_tokens))
            async with self._slots:
                yield
        finally:
            ticket.release()

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        """The one model."""
        return inference_pb2.ListModelsResponse(models=[self._describe()])

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: Any
    ) -> inference_pb2.Model:
        """The model of that name, or the only one."""
        check_model(request.model, self._model.limits)
        return self._describe()

    def _describe(self) -> inference_pb2.Model:
        identity = self._membership.identity
        return inference_pb2.Model(
            name=self._model.name,
            max_model_len=self._pipeline.max_model_len,
            vocab_size=self._model.limits.vocab_size,
            block_size=identity.block_size if identity else 0,
            numeric_profile=identity.numeric_profile if identity else "",
            ready=self._membership.ready(Role.DECODE),
            disabled=self._switches.off,
        )

    async def _serve(
        self, validate: Callable[[Any, Limits], GenerationRequest], request: Any, context: Any
    ) -> Responses:
        """One answer: check, bind the id to log lines, run, count how it ended."""
        timeline = Timeline()
        arrived_s = timeline.mark(Event.ARRIVED)
        code = "cancelled"  # unless we get to know better
        try:
            checked = await self._checked(validate, request)
            bind_request(checked.request_id)
            left_s = context.time_remaining()
            deadline_s = arrived_s + (self._max_request_s if left_s is None else left_s)
            async with aclosing(self._pipeline.answer(checked, timeline, deadline_s)) as parts:
                num_open = checked.num_choices
                async for part in parts:
                    num_open -= isinstance(part, Finished)
                    if not num_open:  # many a client reads no further
                        code = "ok"
                    yield await self._response(checked.request_id, part)
        except DiptychError as error:
            code = to_status(error).code.name.lower()
            raise
        except Exception:
            code = "internal"
            raise
        finally:
            if code != "ok":
                self._metrics.request_failed(code)
            _log.info("request ended", code=code, timeline=timeline.as_dict())

    async def _checked(
        self, validate: Callable[[Any, Limits], GenerationRequest], request: Any
    ) -> GenerationRequest:
        """The request as the pipeline takes it. Raises what `validate` does, and NotOffered."""
        self._switches.check(request)
        tools = isinstance(request, inference_pb2.ChatRequest) and request.tools_json
        if tools or _num_checked(request) > _AT_ONCE:  # schemas take long for their size
            return await asyncio.to_thread(validate, request, self._model.limits)
        return validate(request, self._model.limits)

    async def _response(self, request_id: str, part: Part) -> inference_pb2.GenerateResponse:
        tokenizer = self._model.tokenizer
        if isinstance(part, PromptPart) and part.logprobs:  # tens of thousands of entries
            return await asyncio.to_thread(response, request_id, part, tokenizer)
        return response(request_id, part, tokenizer)


def _num_checked(request: Any) -> int:
    """Characters of JSON and elements of lists that are looked at one by one, about."""
    stop, constraint = request.stop, request.constraint
    num = len(constraint.json_schema) + len(constraint.regex) + len(constraint.grammar)
    num += len(request.sampling.logit_bias) + len(stop.stop_token_ids)
    num += sum(len(entry.token_ids) for entry in request.resume[:MAX_CHOICES])
    if isinstance(request, inference_pb2.ChatRequest):
        messages = request.messages[:_AT_ONCE]
        num += len(request.tools_json) + len(request.messages)
        num += sum(len(call.arguments) for message in messages for call in message.tool_calls)
    else:
        num += len(request.token_ids.ids)
    return num


class AdminServicer:
    """What an operator asks; see admin.proto."""

    def __init__(
        self,
        membership: Membership,
        registry: RegistryServicer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._membership = membership
        self._registry = registry
        self._clock = clock

    async def ListWorkers(
        self, request: admin_pb2.ListWorkersRequest, context: Any
    ) -> admin_pb2.ListWorkersResponse:
        """All workers that are or lately were here."""
        now = self._clock()
        rows = [_row(worker, now) for worker in self._membership.snapshot()]
        return admin_pb2.ListWorkersResponse(workers=rows)

    async def DrainWorker(
        self, request: admin_pb2.DrainWorkerRequest, context: Any
    ) -> admin_pb2.DrainWorkerResponse:
        """Have a worker finish or hand over what it has and end; returns when it has ended."""
        worker = self._worker(request.worker_id)
        deadline_s = request.deadline_s
        if not 0 <= deadline_s <= MAX_REQUEST_S:
            raise InvalidRequest("deadline_s", f"{deadline_s:g}; expected seconds, 0 or more")
        self._registry.drain(worker, deadline_s)
        _log.info("worker is to drain", worker=worker.peer.worker_id)
        wait_s = (deadline_s or _WORKERS_OWN_S) + _END_S
        ends_s = self._clock() + min(wait_s, context.time_remaining() or wait_s)
        while self._is_here(worker):
            if (left_s := ends_s - self._clock()) <= 0:
                raise DeadlineExceeded(f"worker {worker.peer.worker_id} is still draining")
            await self._membership.wait_for_change(min(left_s, 1.0))
        return admin_pb2.DrainWorkerResponse()

    def _worker(self, worker_id: str) -> Worker:
        rows = self._membership.snapshot()
        for row in rows:
            if row.peer.worker_id == worker_id:
                return row
        known = ", ".join(row.peer.worker_id for row in rows) or "none"
        if not worker_id:
            raise InvalidRequest("worker_id", f"unset; expected one of {known}")
        raise NotFound(f"worker_id: {worker_id!r} is not here; known: {known}")

    def _is_here(self, worker: Worker) -> bool:
        """Whether it has not ended: one that only says nothing has not."""
        return any(
            row.peer.incarnation == worker.peer.incarnation
            and (row.state is not WorkerState.SUSPECT or self._registry.hears(row))
            for row in self._membership.snapshot()
        )


def _row(worker: Worker, now: float) -> admin_pb2.Worker:
    load, totals = worker.load, worker.load.totals
    return admin_pb2.Worker(
        worker_id=worker.peer.worker_id,
        incarnation=worker.peer.incarnation,
        role=worker.role.value,
        state=worker.state.value,
        address=worker.peer.address,
        http_address=worker.http_address,
        model=worker.model.name,
        uptime_s=now - worker.since_s,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        free_blocks=load.free_blocks,
        cached_blocks=load.cached_blocks,
        held_blocks=load.held_blocks,
        total_blocks=load.total_blocks,
        quarantined_blocks=load.quarantined_blocks,
        links=[_link(link) for link in load.links],
        max_model_len=worker.model.max_model_len,
        kv_pool_bytes=worker.kv_pool.num_bytes,
        kv_pool_limit=worker.kv_pool.limit,
        health=(Health.SICK if worker.is_sick else load.health).value,
        **asdict(totals),
    )


def _link(link: KVLink) -> admin_pb2.KVLink:
    return admin_pb2.KVLink(
        worker_id=link.peer,
        lane=link.lane,
        bytes_per_s=link.bytes_per_s,
        num_bytes=link.num_bytes,
        memory=link.memory,
    )
