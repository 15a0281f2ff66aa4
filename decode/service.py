"""DecodeService: one answer a call, from the blocks' arrival to the last token.

(compile) submit -> FetchEvent -> intake task --------> tokens ... -> finished
                       |  again after a preemption          |
the caller goes away, at any point: cancel the intake, wait until its reads are terminal, abort

While there is nothing to say and the engine runs, `Alive` is said every BEAT_S.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from decode.kv_fetch import FetchJob, KvFetcher
from decode.shared_parts import Parts, PartsStore
from engine.base.errors import DiptychError, InvalidRequest, Unavailable
from engine.base.types import Constraint
from engine.constraints import Compiler, Matcher
from engine.pb.diptych.internal.v1 import worker_pb2
from engine.rpc.convert import (
    logprobs_to_pb,
    prefill_peer_of,
    reason_to_pb,
    sampling_from_pb,
    stop_from_pb,
)
from engine.rpc.liveness import BEAT_S
from engine.scheduling.events import Event, FetchEvent, FinishedEvent, TokensEvent
from engine.scheduling.request import EngineRequest
from engine.step.engine_thread import Stream
from engine.step.operations import Abandon
from engine.telemetry.log import get_logger
from engine.telemetry.timeline import Event as Mark
from engine.telemetry.timeline import Timeline
from worker.process import WorkerProcess

_log = get_logger(__name__)
_NO_DEADLINE_S = 3600.0
_ALIVE = worker_pb2.DecodeResponse(alive=worker_pb2.Alive())
_UNKNOWN = worker_pb2.DecodeResponse(unknown=worker_pb2.Unknown())


class DecodeServicer:
    """Serves answers; holds nothing that another decode worker could not make again."""

    def __init__(self, host: WorkerProcess) -> None:
        self._host = host
        self._intake = KvFetcher(host)
        self._parts = PartsStore(host.check_token_ids)
        count = host.metrics.constraints.tried
        self._compiler = Compiler(host.vocabulary, count) if host.vocabulary else None

    def prepare(self) -> None:
        """Start what the first constrained answer would wait for."""
        if self._compiler is not None:
            self._compiler.prepare()

    async def Decode(
        self, request: worker_pb2.DecodeRequest, context: Any
    ) -> AsyncIterator[worker_pb2.DecodeResponse]:
        """One answer; see worker.proto."""
        self._host.check_incarnation(request.incarnation)
        parts = self._parts.of(request)
        if parts is None:
            yield _UNKNOWN
            return
        work = self._work(request, parts, context.time_remaining())
        if request.shared_key and request.prompt_token_ids:
            yield _ALIVE  # the other choices wait for it
        constraint = parts.constraint
        if constraint is not None:
            compiling = asyncio.ensure_future(self._matcher(constraint, work.output))
            try:
                while not (await asyncio.wait({compiling}, timeout=BEAT_S))[0]:
                    yield _ALIVE
                work = replace(work, matcher=compiling.result())
            finally:
                compiling.cancel()
        with self._host.calls.serving(work) as stream:
            answer = _Answer(self, stream, request, context.time_remaining())
            try:
                async for response in answer.responses():
                    yield response
            except InvalidRequest as error:
                if constraint is not None and error.field == "constraint" and self._compiler:
                    self._compiler.forget(constraint)  # what its copies learned was too much
                raise
            finally:
                answer.close()

    async def _matcher(self, constraint: Constraint, output: Sequence[int]) -> Matcher:
        """Where the answer stands in its constraint. Raises InvalidRequest, Unavailable."""
        if self._compiler is None:
            raise InvalidRequest("constraint", "none is possible with this model")
        return await self._compiler.matcher(constraint, output)

    @property
    def host(self) -> WorkerProcess:
        """The worker around this service."""
        return self._host

    @property
    def fetcher(self) -> KvFetcher:
        """Where blocks come in."""
        return self._intake

    def _work(
        self, request: worker_pb2.DecodeRequest, parts: Parts, time_remaining_s: float | None
    ) -> EngineRequest:
        if not parts.prompt:
            raise InvalidRequest("prompt_token_ids", "empty; expected at least one token")
        self._host.check_token_ids(request.output_token_ids)
        if request.stop.max_tokens < 1 and not request.HasField("num_prompt_logprobs"):
            raise InvalidRequest("stop.max_tokens", "0; expected at least 1")
        return EngineRequest(
            request_id=request.request_id,
            prompt=parts.prompt,
            output=tuple(request.output_token_ids),
            salt=self._host.salt(request.cache_salt),
            sampling=sampling_from_pb(request.sampling, parts.logit_bias),
            stop=stop_from_pb(request.stop, parts.stop_token_ids),
            fetch=request.HasField("prefill"),
            source=request.prefill.incarnation,
            priority=request.priority,
            deadline_s=None if time_remaining_s is None else time.monotonic() + time_remaining_s,
            num_logprobs=request.num_logprobs if request.HasField("num_logprobs") else None,
            num_prompt_logprobs=(
                request.num_prompt_logprobs if request.HasField("num_prompt_logprobs") else None
            ),
        )


class _Answer:
    """One Decode call: its stream of events, its fetch, its timeline."""

    def __init__(
        self,
        service: DecodeServicer,
        stream: Stream,
        request: worker_pb2.DecodeRequest,
        time_remaining_s: float | None,
    ) -> None:
        self._service = service
        self._request = request
        self._timeline = Timeline()
        self._timeline.mark(Mark.ARRIVED)
        self._deadline_s = time.monotonic() + (time_remaining_s or _NO_DEADLINE_S)
        self._fetch: FetchJob | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._stream = stream

    async def responses(self) -> AsyncIterator[worker_pb2.DecodeResponse]:
        """Messages to the coordinator; tokens that have gathered go as one."""
        held: Event | None = None
        while held is not None or not self._stream.finished:
            event, held = held or await self._stream.next_within(BEAT_S), None
            if event is None:
                if self._service.host.engine.responsive:
                    yield _ALIVE
            elif isinstance(event, TokensEvent):
                self._timeline.mark(Mark.TOKENS)
                events = [event]
                while isinstance(held := self._stream.next_ready(), TokensEvent):
                    events.append(held)
                if any(event.prompt_logprobs for event in events):  # of thousands of tokens
                    tokens = await asyncio.to_thread(self._tokens, events)
                else:
                    tokens = self._tokens(events)
                yield worker_pb2.DecodeResponse(tokens=tokens)
            elif isinstance(event, FetchEvent):
                self._start_fetch(event)
            elif isinstance(event, FinishedEvent):
                yield worker_pb2.DecodeResponse(finished=self._finished(event))

    def close(self) -> None:
        """However the call ends."""
        _log.info("decode ended", done=self._stream.finished, timeline=self._timeline.as_dict())
        if not self._stream.finished:
            self._service.host.in_background(self._clean_up())

    async def _clean_up(self) -> None:
        """Free the blocks but those that a read may still write: the read holds them itself then.

        Whoever waits for these blocks makes them.
        """
        self._service.host.engine.post(Abandon(self._stream.key))
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.gather(self._fetching, return_exceptions=True)
        if self._fetch is not None:
            await self._service.fetcher.cancel(self._fetch)
        self._stream.abort()
        await self._stream.drain()

    def _start_fetch(self, event: FetchEvent) -> None:
        peer = prefill_peer_of(self._request)
        assert peer is not None, "only work with a peer fetches"
        self._timeline.mark(Mark.SCHEDULED)
        if self._fetch is None:
            self._fetch = FetchJob(
                request_id=self._request.request_id,
                key=event.key,
                peer=peer,
                cache_salt=self._request.cache_salt,
                priority=self._request.priority,
                deadline_s=self._deadline_s,
                timeline=self._timeline,
            )
        self._fetching = self._service.host.in_background(self._run_fetch(self._fetch, event))

    async def _run_fetch(self, fetch: FetchJob, event: FetchEvent) -> None:
        try:
            await self._service.fetcher.run(fetch, event)
        except DiptychError as error:
            self._stream.push(error)
        except Exception as error:
            _log.exception("intake failed")
            self._stream.push(Unavailable(f"intake failed: {error}", lost="prefill"))

    def _finished(self, event: FinishedEvent) -> worker_pb2.DecodeFinished:
        self._timeline.mark(Mark.FINISHED)
        if event.error:
            raise event.error
        return worker_pb2.DecodeFinished(
            finish_reason=reason_to_pb(event.reason),
            matched_stop_token=event.matched_stop,
            cached_tokens=event.counts.num_cached_tokens,
            draft_tokens=event.counts.num_draft_tokens,
            accepted_tokens=event.counts.num_accepted_tokens,
            queue_s=event.counts.queue_s,
            prefill_s=self._fetch.prefill_s if self._fetch else 0.0,
            kv_transfer_s=self._fetch.kv_transfer_s if self._fetch else 0.0,
        )

    def _tokens(self, events: Sequence[TokensEvent]) -> worker_pb2.Tokens:
        counts = events[-1].counts
        return worker_pb2.Tokens(
            token_ids=[token for event in events for token in event.token_ids],
            logprobs=logprobs_to_pb(s for event in events for s in event.logprobs),
            prompt_logprobs=logprobs_to_pb(s for event in events for s in event.prompt_logprobs),
            cached_tokens=counts.num_cached_tokens,
            draft_tokens=counts.num_draft_tokens,
            accepted_tokens=counts.num_accepted_tokens,
            queue_s=counts.queue_s,
            prefill_s=self._fetch.prefill_s if self._fetch else 0.0,
            kv_transfer_s=self._fetch.kv_transfer_s if self._fetch else 0.0,
        )
