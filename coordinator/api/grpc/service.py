"""InferenceService: public messages <-> the frontend; see inference.proto."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from coordinator.api.frontend import Frontend
from coordinator.api.grpc.requests import read_request, read_tokenize
from coordinator.api.grpc.responses import response
from coordinator.api.values import PromptEvent
from engine.pb.diptych.v1 import inference_pb2

Responses = AsyncGenerator[inference_pb2.GenerateResponse, None]


class InferenceServicer:
    """The public API. Method names are the wire's."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def Generate(self, request: Any, context: Any) -> Responses:
        """Complete a prompt."""
        generate = read_request(request)
        async with aclosing(self._frontend.generate(generate, context.time_remaining())) as events:
            async for event in events:
                if isinstance(event, PromptEvent) and event.logprobs:  # tens of thousands
                    yield await asyncio.to_thread(response, generate.request_id, event)
                else:
                    yield response(generate.request_id, event)

    Chat = Generate  # the same, of a conversation

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.TokenizeResponse:
        """Token ids of a text or of a rendered conversation."""
        ids = await self._frontend.tokenize(read_tokenize(request), context.time_remaining())
        limit = self._frontend.model().max_model_len
        return inference_pb2.TokenizeResponse(token_ids=ids, max_model_len=limit)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.DetokenizeResponse:
        """Text of token ids."""
        text = await self._frontend.detokenize(
            request.token_ids,
            request.model,
            skip_special_tokens=request.skip_special_tokens,
            left_s=context.time_remaining(),
        )
        return inference_pb2.DetokenizeResponse(text=text)

    async def ListModels(
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        """The one model."""
        return inference_pb2.ListModelsResponse(models=[self._model("")])

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: Any
    ) -> inference_pb2.Model:
        """The model of that name, or the only one."""
        return self._model(request.model)

    def _model(self, name: str) -> inference_pb2.Model:
        return inference_pb2.Model(**asdict(self._frontend.model(name)))
