"""DecodeService: one answer a call, from the blocks' arrival to the last token.

    (compile) submit -> FetchEvent -> fetch task ---------> tokens ... -> finished
                           |  again after a preemption          |
    the caller is gone, at any point: cancel the fetch, wait until its reads are terminal, abort

In silence, and while the engine runs, the service sends `Alive` every BEAT_S.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from decode.kv_fetch import FetchJob, KvFetcher
from decode.shared_parts import Parts, PartsStore
from engine.base.errors import DiptychError, InvalidRequest, Unavailable
from engine.base.types import Constraint
from engine.constraints import Compiler, Matcher
from engine.pb.diptych.internal.v1 import worker_pb2 as pb
from engine.rpc.convert import (
    enum_to_pb,
    logprobs_to_pb,
    optional,
    prefill_peer_of,
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
from kvtransfer.service_host import ServiceHost

_log = get_logger(__name__)
_NO_DEADLINE_S = 3600.0
_ALIVE = pb.DecodeResponse(alive=pb.Alive())
_UNKNOWN = pb.DecodeResponse(unknown=pb.Unknown())


class DecodeServicer:
    """Serves answers; holds nothing that another worker could not make again."""

    def __init__(self, host: ServiceHost) -> None:
        self.host = host
        self.fetcher = KvFetcher(host)
        self._parts = PartsStore(host.check_token_ids)

    def prepare(self) -> None:
        """Start now what the first constrained answer would wait for: threads and processes."""
        if self._compiler:
            self._compiler.prepare()

    async def Decode(
        self, request: pb.DecodeRequest, context: Any
    ) -> AsyncIterator[pb.DecodeResponse]:
        """Serve one answer; see worker.proto."""
        self.host.check_incarnation(request.incarnation)
        parts = self._parts.of(request)
        if parts is None:
            yield _UNKNOWN
            return
        engine_request = self._engine_request(request, parts, context.time_remaining())
        self.host.calls.check_takes(engine_request)
        if request.shared_key and request.prompt_token_ids:
            yield _ALIVE  # the other choices wait for it
        constraint = parts.constraint
        if constraint is not None:
            compiling = asyncio.ensure_future(self._matcher(constraint, engine_request.output))
            try:
                while not (await asyncio.wait({compiling}, timeout=BEAT_S))[0]:
                    yield _ALIVE
                engine_request = replace(engine_request, matcher=compiling.result())
            finally:
                compiling.cancel()
        with self.host.calls.serving(engine_request) as stream:
            call = _DecodeCall(self, stream, request, context.time_remaining())
            try:
                async for response in call.responses():
                    yield response
            except InvalidRequest as error:
                if constraint is not None and error.field == "constraint" and self._compiler:
                    self._compiler.forget(constraint)  # its copies learned more than the limit
                raise
            finally:
                call.close()

    @cached_property
    def _compiler(self) -> Compiler | None:
        """The compiler, which has threads and a tokenizer; None: no constraints here."""
        if self.host.vocabulary is None:
            return None
        return Compiler(self.host.vocabulary, self.host.metrics.constraints.tried)

    async def _matcher(self, constraint: Constraint, output: Sequence[int]) -> Matcher:
        """Return the state of the constraint after `output`. Raises InvalidRequest, Unavailable."""
        if self._compiler is None:
            raise InvalidRequest("constraint", "none is possible with this model")
        return await self._compiler.matcher(constraint, output)

    def _engine_request(
        self, request: pb.DecodeRequest, parts: Parts, time_remaining_s: float | None
    ) -> EngineRequest:
        if not parts.prompt:
            raise InvalidRequest("prompt_token_ids", "empty; expected at least one token")
        self.host.check_token_ids(request.output_token_ids)
        if request.stop.max_tokens < 1 and not request.HasField("num_prompt_logprobs"):
            raise InvalidRequest("stop.max_tokens", "0; expected at least 1")
        # A worker that is its own prefill worker computes the prompt as part of the answer.
        is_apart = request.prefill.incarnation != self.host.incarnation
        return EngineRequest(
            request_id=request.request_id,
            prompt=parts.prompt,
            output=tuple(request.output_token_ids),
            salt=self.host.salt(request.cache_salt),
            sampling=sampling_from_pb(request.sampling, parts.logit_bias),
            stop=stop_from_pb(request.stop, parts.stop_token_ids),
            fetch=request.HasField("prefill") and is_apart,
            source=request.prefill.incarnation,
            priority=request.priority,
            deadline_s=None if time_remaining_s is None else time.monotonic() + time_remaining_s,
            num_logprobs=optional(request, "num_logprobs"),
            num_prompt_logprobs=optional(request, "num_prompt_logprobs"),
        )


class _DecodeCall:
    """One Decode call: its stream of events, its fetch, its timeline."""

    def __init__(
        self,
        service: DecodeServicer,
        stream: Stream,
        request: pb.DecodeRequest,
        time_remaining_s: float | None,
    ) -> None:
        self._host = service.host
        self._fetcher = service.fetcher
        self._request = request
        self._timeline = Timeline()
        self._timeline.mark(Mark.ARRIVED)
        self._deadline_s = time.monotonic() + (time_remaining_s or _NO_DEADLINE_S)
        self._fetch: FetchJob | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._stream = stream

    async def responses(self) -> AsyncIterator[pb.DecodeResponse]:
        """Messages to the coordinator; tokens that gathered meanwhile go as one message."""
        next_event: Event | None = None
        while next_event is not None or not self._stream.finished:
            event, next_event = next_event or await self._stream.next_within(BEAT_S), None
            if event is None:
                if self._host.engine.responsive:
                    yield _ALIVE
            elif isinstance(event, TokensEvent):
                self._timeline.mark(Mark.TOKENS)
                events = [event]
                while isinstance(next_event := self._stream.next_ready(), TokensEvent):
                    events.append(next_event)
                if any(event.prompt_logprobs for event in events):  # of thousands of tokens
                    tokens = await asyncio.to_thread(self._tokens, events)
                else:
                    tokens = self._tokens(events)
                yield pb.DecodeResponse(tokens=tokens)
            elif isinstance(event, FetchEvent):
                self._start_fetch(event)
            elif isinstance(event, FinishedEvent):
                yield pb.DecodeResponse(finished=self._finished(event))

    def close(self) -> None:
        """Log the end; give up what is held where the answer is not finished."""
        _log.info("decode ended", done=self._stream.finished, timeline=self._timeline.as_dict())
        if not self._stream.finished:
            self._host.in_background(self._clean_up())

    async def _clean_up(self) -> None:
        """Free the blocks, but those that a read may still write: the read pins them itself then.

        Requests that wait for these blocks compute them.
        """
        self._host.engine.post(Abandon(self._stream.key))
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.gather(self._fetching, return_exceptions=True)
        if self._fetch is not None:
            await self._fetcher.cancel(self._fetch)
        self._stream.abort()
        await self._stream.drain()

    def _start_fetch(self, event: FetchEvent) -> None:
        peer = prefill_peer_of(self._request)
        assert peer is not None, "only requests with a peer fetch"
        self._timeline.mark(Mark.SCHEDULED)
        if self._fetch is None:
            self._fetch = FetchJob(self._request, event.key, peer, self._deadline_s, self._timeline)
        self._fetching = self._host.in_background(self._run_fetch(self._fetch, event))

    async def _run_fetch(self, fetch: FetchJob, event: FetchEvent) -> None:
        try:
            await self._fetcher.run(fetch, event)
        except DiptychError as error:
            self._stream.push(error)
        except Exception as error:
            _log.exception("fetch failed")
            self._stream.push(Unavailable(f"fetch failed: {error}", lost="prefill"))

    def _finished(self, event: FinishedEvent) -> pb.DecodeFinished:
        self._timeline.mark(Mark.FINISHED)
        if event.error:
            raise event.error
        return pb.DecodeFinished(
            finish_reason=enum_to_pb(event.reason),
            matched_stop_token=event.matched_stop,
            cached_tokens=event.counts.num_cached_tokens,
            draft_tokens=event.counts.num_draft_tokens,
            accepted_tokens=event.counts.num_accepted_tokens,
            queue_s=event.counts.queue_s,
            prefill_s=self._fetch.prefill_s if self._fetch else 0.0,
            kv_transfer_s=self._fetch.kv_transfer_s if self._fetch else 0.0,
        )

    def _tokens(self, events: Sequence[TokensEvent]) -> pb.Tokens:
        counts = events[-1].counts
        return pb.Tokens(
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
