"""PrefillService: a pure function from a prompt's whole blocks to their KV. It never samples."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from engine.errors import DiptychError, InvalidRequest, Unavailable
from engine.events import AnnouncedEvent, FinishedEvent
from engine.pb.diptych.internal.v1 import worker_pb2
from engine.request import Work
from engine.telemetry.log import get_logger
from engine.telemetry.timeline import Event as Mark
from engine.telemetry.timeline import Timeline
from engine.types import FinishReason
from kvtransfer.host import WorkerHost
from prefill.announce import Announcer

_log = get_logger(__name__)


class PrefillServicer:
    """Computes what is not cached, chunk by chunk, and announces each chunk as it completes."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host

    async def Prefill(
        self, request: worker_pb2.PrefillRequest, context: Any
    ) -> AsyncGenerator[worker_pb2.PrefillResponse]:
        """One prompt; see worker.proto."""
        work = self._work(request)
        timeline = Timeline()
        timeline.mark(Mark.ARRIVED)
        stream = self._host.engine.submit(work)
        announcer = Announcer(self._host, request.caller_incarnation)
        gone = True  # unless the caller has heard how the call ended: then the leases are its own
        try:
            while not stream.finished:
                event = await stream.next()
                if isinstance(event, AnnouncedEvent):
                    timeline.mark(Mark.ANNOUNCED)
                    yield worker_pb2.PrefillResponse(ready=announcer.offer(event))
                elif isinstance(event, FinishedEvent):
                    timeline.mark(Mark.FINISHED)
                    yield worker_pb2.PrefillResponse(finished=self._finished(event, work, timeline))
            gone = False
        except DiptychError:
            gone = False
            raise
        finally:
            if gone or not stream.finished:
                self._host.in_background(announcer.withdraw(stream))
            _log.info("prefill ended", done=stream.finished, timeline=timeline.as_dict())

    def _work(self, request: worker_pb2.PrefillRequest) -> Work:
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
        return Work(
            request_id=request.request_id,
            prompt=tokens,
            salt=self._host.salt(request.cache_salt),
            announce_from=request.num_held_blocks,
            priority=request.priority,
        )

    @staticmethod
    def _finished(
        event: FinishedEvent, work: Work, timeline: Timeline
    ) -> worker_pb2.PrefillFinished:
        if event.reason is FinishReason.ABORTED:
            raise event.error or Unavailable("the prefill worker gave the prompt up")
        total_s = timeline.between(Mark.ARRIVED, Mark.FINISHED)
        return worker_pb2.PrefillFinished(
            num_computed_tokens=len(work.prompt) - event.counts.num_cached_tokens,
            num_cached_tokens=event.counts.num_cached_tokens,
            queue_s=event.counts.queue_s,
            compute_s=max(0.0, total_s - event.counts.queue_s),
        )
