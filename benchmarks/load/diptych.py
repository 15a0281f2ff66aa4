"""Requests to our public gRPC API."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.plan import Endpoint, Record
from coordinator.client import generate_request
from engine.pb.diptych.v1 import inference_pb2, inference_pb2_grpc
from engine.rpc.channel import open_channel


class DiptychApi:
    """One channel for all requests, as a client service would have."""

    def __init__(self, endpoint: Endpoint, started_s: float) -> None:
        self._channel = open_channel(endpoint.address)
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._extra = endpoint.extra
        self._started_s = started_s

    async def run(self, record: Record, prompt: tuple[int, ...], max_tokens: int) -> None:
        """Play one request into `record`. Raises grpc.aio.AioRpcError."""
        request = generate_request(
            prompt, temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **self._extra
        )
        call = self._stub.Generate(request)
        text: list[str] = []
        try:
            async for response in call:
                at_s = time.monotonic() - self._started_s
                if response.HasField("delta"):
                    record.arrive(at_s, len(response.delta.token_ids))
                    text.append(response.delta.text)
                else:
                    _finish(record, response.finished)
        finally:
            call.cancel()
            record.text = "".join(text)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


def _finish(record: Record, finished: inference_pb2.Finished) -> None:
    name = inference_pb2.FinishReason.Name(finished.finish_reason)
    record.finish_reason = name.removeprefix("FINISH_REASON_").lower()
    record.completion_tokens = finished.usage.completion_tokens
    record.cached_tokens = finished.usage.cached_tokens
    record.draft_tokens = finished.usage.draft_tokens
    record.accepted_tokens = finished.usage.accepted_tokens
