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
from coordinator.generation.events import PromptEvent
from engine.pb.diptych.v1 import inference_pb2 as pb

Responses = AsyncGenerator[pb.GenerateResponse, None]


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

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        """Token ids of a text or of a rendered conversation."""
        ids = await self._frontend.tokenize(read_tokenize(request), context.time_remaining())
        limit = self._frontend.model().max_model_len
        return pb.TokenizeResponse(token_ids=ids, max_model_len=limit)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Any
    ) -> pb.DetokenizeResponse:
        """Text of token ids."""
        text = await self._frontend.detokenize(
            request.token_ids,
            request.model,
            skip_special_tokens=request.skip_special_tokens,
            left_s=context.time_remaining(),
        )
        return pb.DetokenizeResponse(text=text)

    async def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:
        """The one model."""
        return pb.ListModelsResponse(models=[self._model("")])

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.Model:
        """The model of that name, or the only one."""
        return self._model(request.model)

    def _model(self, name: str) -> pb.Model:
        return pb.Model(**asdict(self._frontend.model(name)))
