"""The Open Inference Protocol, so that clients of Triton and KServe work unchanged.

A thin translation: a ModelInferRequest becomes a call of the frontend, and its events become
tensors. On ModelStreamInfer requests run at once:

    stream of requests --read--> one task a request --frontend--> responses, each with its id
                        |                                |
                        '-- waits while too many run     '-- an error ends the request, not the
                                                             stream (unless metadata asks so)

Ending the stream ends all its requests. Owned by the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from coordinator.api.frontend import Frontend
from coordinator.api.oip import model as oip_model
from coordinator.api.oip.request import ParsedRequest, read_request
from coordinator.api.oip.responses import FINAL, ResponseBuilder, bare_response
from coordinator.api.version import installed_version
from coordinator.generation.fan_in import Merge
from engine.base.errors import (
    DeadlineExceeded,
    DiptychError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from engine.pb.inference import grpc_service_pb2 as pb
from engine.rpc.status import RpcStatus, internal, to_status
from engine.telemetry.coordinator_metrics import CoordinatorMetrics
from engine.telemetry.log import get_logger

_log = get_logger(__name__)

_MAX_OPEN = 256  # requests of one stream at once; the next ones stay in the client's buffers
_LARGE_BYTES = 64 * 1024  # a larger request is read in a thread
_STUCK_S = 10.0  # beyond the limit of a request, for a client that does not read
_ERRORS_END_STREAM = "triton_grpc_error"  # metadata: an error ends the stream

Responses = AsyncGenerator[pb.ModelStreamInferResponse, None]


@dataclass(eq=False)
class OipServicer:
    """See grpc_service.proto. `served` is the model; `ready`: whether a decode worker is ready."""

    served: str
    frontend: Frontend
    metrics: CoordinatorMetrics
    ready: Callable[[], bool]
    max_request_s: float

    # Method names are the wire's.
    async def ServerLive(self, request: Any, context: Any) -> pb.ServerLiveResponse:
        """Whether this process is live: always."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> pb.ServerReadyResponse:
        """Whether a decode worker is ready."""
        return pb.ServerReadyResponse(ready=self.ready())

    async def ModelReady(
        self, request: pb.ModelReadyRequest, context: Any
    ) -> pb.ModelReadyResponse:
        """The same for a model; one that is not served is not ready."""
        served = oip_model.is_served(request.name, request.version, self.served)
        return pb.ModelReadyResponse(ready=served and self.ready())

    async def ServerMetadata(self, request: Any, context: Any) -> pb.ServerMetadataResponse:
        """Name, version, and the protocol's extensions that are served."""
        return pb.ServerMetadataResponse(
            name=oip_model.PLATFORM, version=installed_version(), extensions=oip_model.EXTENSIONS
        )

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: Any
    ) -> pb.ModelMetadataResponse:
        """The model's tensors."""
        oip_model.check_served(request.name, request.version, self.served)
        return oip_model.metadata(self.served)

    async def ModelConfig(
        self, request: pb.ModelConfigRequest, context: Any
    ) -> pb.ModelConfigResponse:
        """The model's configuration in Triton's form."""
        oip_model.check_served(request.name, request.version, self.served)
        config = oip_model.config(self.served, self.frontend.model().max_model_len)
        return pb.ModelConfigResponse(config=config)

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: Any
    ) -> pb.ModelInferResponse:
        """One whole response."""
        parsed = await self._read(request)
        if parsed.streaming:
            raise InvalidRequest("streaming", "true; expected ModelStreamInfer, which can stream")
        async with aclosing(self._responses(parsed, context)) as responses:
            (response,) = [response async for response in responses]
        response.parameters.pop(FINAL)  # of streams
        return response

    async def ModelStreamInfer(
        self, requests: AsyncIterator[pb.ModelInferRequest], context: Any
    ) -> Responses:
        """Any number of requests at once."""
        invocation_metadata = dict(context.invocation_metadata() or ())
        end_stream = str(invocation_metadata.get(_ERRORS_END_STREAM, "")).lower() == "true"
        slots, ended = asyncio.Semaphore(_MAX_OPEN), asyncio.Event()
        merge: Merge[pb.ModelStreamInferResponse] = Merge()

        async def answer(request: pb.ModelInferRequest) -> None:
            try:
                await self._answer(request, context, merge, end_stream)
            finally:
                slots.release()
                ended.set()

        async def read() -> None:
            while True:
                try:
                    request = await anext(requests, None)
                except DeadlineExceeded:
                    if merge.num_open > 1 or ended.is_set():  # the client waited for responses
                        ended.clear()
                        continue
                    raise
                if request is None:
                    return
                await slots.acquire()
                merge.add(answer(request), self.max_request_s + _STUCK_S)

        async with merge:
            merge.add(read())
            async for response in merge:
                yield response

    async def _answer(
        self,
        request: pb.ModelInferRequest,
        context: Any,
        merge: Merge[pb.ModelStreamInferResponse],
        end_stream: bool,
    ) -> None:
        """One request of a stream, its error included."""
        stream_response = pb.ModelStreamInferResponse
        try:
            parsed = await self._read(request)
            async with aclosing(self._responses(parsed, context)) as responses:
                async for response in responses:
                    await merge.put(stream_response(infer_response=response))
            if parsed.empty_final:
                last = bare_response(self.served, request.id, final=True)
                await merge.put(stream_response(infer_response=last))
        except DiptychError as error:
            if end_stream:
                raise
            await merge.put(_failure(request, to_status(error), error))
        except Exception as error:
            _log.exception("request of a stream failed", request_id=request.id)
            if end_stream:
                raise
            status = internal("internal error; the server's log tells more")
            await merge.put(_failure(request, status, error))

    async def _read(self, request: pb.ModelInferRequest) -> ParsedRequest:
        """The parsed request. A failure is counted here; the frontend counts later ones."""
        try:
            if request.ByteSize() > _LARGE_BYTES:  # tensors of it are unpacked one by one
                return await asyncio.to_thread(read_request, request, self.served)
            return read_request(request, self.served)
        except DiptychError as error:
            code = to_status(error).code.name.lower()
            self.metrics.request_failed(code)
            _log.info("request refused", request_id=request.id, code=code, reason=error.message)
            raise

    async def _responses(
        self, parsed: ParsedRequest, context: Any
    ) -> AsyncGenerator[pb.ModelInferResponse, None]:
        """The responses to a request: one, or with `streaming` any number."""
        builder: ResponseBuilder | None = None
        limits_s = (context.time_remaining(), parsed.timeout_s)
        left_s = min((s for s in limits_s if s is not None), default=None)
        call = self.frontend.generate(parsed.generate, left_s)
        async with aclosing(call) as events:
            async for event in events:
                # With the first event the number of choices has been checked.
                builder = builder or ResponseBuilder(parsed)
                builder.add(event)
                if parsed.streaming and builder.worth_sending:
                    final = builder.finished and not parsed.empty_final
                    yield builder.take(final=final)
        if not parsed.streaming and builder:
            yield builder.take(final=not parsed.empty_final)


def _failure(
    request: pb.ModelInferRequest, status: RpcStatus, error: Exception
) -> pb.ModelStreamInferResponse:
    """The error of a request: a message, and the status that a unary call would have."""
    response = bare_response(request.model_name, request.id, final=True)
    response.parameters["error_code"].string_param = status.code.name
    if isinstance(error, Overloaded | Unavailable):
        response.parameters["retry_after_s"].double_param = error.retry_after_s
    return pb.ModelStreamInferResponse(error_message=status.message, infer_response=response)
