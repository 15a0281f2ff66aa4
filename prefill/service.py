"""PrefillService: a pure function from a prompt's whole blocks to their KV. It never samples.

    submit -> chunk announced under a lease ... -> finished -> every lease released by the caller
    the caller is gone, at any point: abort the request, end all leases of the call

A call and its leases end together, so a caller always learns whether its leases still hold. In
silence, and while the engine runs, the service sends `Alive` every BEAT_S.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from engine.base.errors import InvalidRequest, Unavailable
from engine.base.types import FinishReason
from engine.pb.diptych.internal.v1 import worker_pb2 as pb
from engine.rpc.liveness import BEAT_S
from engine.scheduling.events import AnnouncedEvent, FinishedEvent
from engine.scheduling.request import EngineRequest
from engine.telemetry.log import get_logger
from engine.telemetry.timeline import Event as Mark
from engine.telemetry.timeline import Timeline
from kvtransfer.service_host import ServiceHost
from prefill.block_publisher import BlockPublisher

_log = get_logger(__name__)
_ALIVE = pb.PrefillResponse(alive=pb.Alive())


class PrefillServicer:
    """Computes what is not cached, chunk by chunk, and announces each chunk as it completes."""

    def __init__(self, host: ServiceHost) -> None:
        self._host = host

    async def Prefill(
        self, request: pb.PrefillRequest, context: Any
    ) -> AsyncGenerator[pb.PrefillResponse]:
        """Serve one prompt; see worker.proto."""
        engine_request = self._engine_request(request, context.time_remaining())
        timeline = Timeline()
        timeline.mark(Mark.ARRIVED)
        with self._host.calls.serving(engine_request) as stream:
            publisher = BlockPublisher(self._host, request.caller_incarnation, request.request_id)
            try:
                while not stream.finished:
                    event = await stream.next_within(BEAT_S)
                    if event is None:
                        if self._host.engine.responsive:
                            yield _ALIVE
                    elif isinstance(event, AnnouncedEvent):
                        timeline.mark(Mark.ANNOUNCED)
                        ready = publisher.publish(event)
                        if request.checksums:
                            ready = await publisher.checksummed(ready)
                        yield pb.PrefillResponse(ready=ready)
                    elif isinstance(event, FinishedEvent):
                        timeline.mark(Mark.FINISHED)
                        finished = self._finished(event, engine_request, timeline)
                        yield pb.PrefillResponse(finished=finished)
                while not await publisher.ended_within(BEAT_S):
                    stream.next_ready()  # raises where a drain hands this call over
                    yield _ALIVE
            finally:
                self._host.in_background(publisher.revoke(stream))
                _log.info("prefill ended", done=stream.finished, timeline=timeline.as_dict())

    def _engine_request(
        self, request: pb.PrefillRequest, time_remaining_s: float | None
    ) -> EngineRequest:
        self._host.check_incarnation(request.incarnation)
        tokens = tuple(request.token_ids)
        size = self._host.identity.block_size
        if not tokens or len(tokens) % size:
            raise InvalidRequest(
                "token_ids", f"{len(tokens)} tokens; expected a multiple of the block size {size}"
            )
        self._host.check_token_ids(tokens)
        if not request.caller_incarnation:
            raise InvalidRequest("caller_incarnation", "expected the caller's incarnation")
        return EngineRequest(
            request_id=request.request_id,
            prompt=tokens,
            salt=self._host.salt(request.cache_salt),
            announce_from=request.num_held_blocks,
            priority=request.priority,
            deadline_s=None if time_remaining_s is None else time.monotonic() + time_remaining_s,
        )

    @staticmethod
    def _finished(
        event: FinishedEvent, request: EngineRequest, timeline: Timeline
    ) -> pb.PrefillFinished:
        if event.reason is FinishReason.ABORTED:
            raise event.error or Unavailable("the prefill worker aborted the prompt")
        total_s = timeline.between(Mark.ARRIVED, Mark.FINISHED)
        return pb.PrefillFinished(
            num_computed_tokens=len(request.prompt) - event.counts.num_cached_tokens,
            num_cached_tokens=event.counts.num_cached_tokens,
            queue_s=event.counts.queue_s,
            compute_s=max(0.0, total_s - event.counts.queue_s),
        )
