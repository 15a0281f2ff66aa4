"""The HTTP API over a scripted frontend, without a coordinator, a socket or gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any, cast

import httpx
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from coordinator.api.frontend import Frontend
from coordinator.api.openai.api import OpenAiApi
from coordinator.api.values import GenerateRequest, ModelCard, TokenizeRequest
from coordinator.generation.events import Delta, Event
from engine.base.errors import InvalidRequest, NotFound
from tests.support.answer_events import finished


class ScriptedFrontend:
    """Sends `events` to each request; `before` runs first, and may raise."""

    def __init__(self, before: Callable[[], Any] = lambda: None) -> None:
        self.requests: list[GenerateRequest] = []
        self.num_open = 0
        self.events: list[Event] = [Delta(0, "ab", [1]), finished()]
        self._before = before

    async def generate(
        self, request: GenerateRequest, left_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        self.num_open += 1
        try:
            if (waiting := self._before()) is not None:
                await waiting
            for event in self.events:
                yield event
        finally:
            self.num_open -= 1

    async def tokenize(self, request: TokenizeRequest, left_s: float | None = None) -> list[int]:
        raise InvalidRequest("chat.messages[0].role", "no")

    async def detokenize(self, token_ids: Any, model: str = "", **options: Any) -> str:
        return f"{list(token_ids)} of {model}"

    def model(self, name: str = "") -> ModelCard:
        if name not in ("", "m"):
            raise NotFound("model: none")
        return ModelCard("m", 100, 50, 16, "p", True, ())


def client(frontend: ScriptedFrontend, limit_s: float = 5.0) -> httpx.AsyncClient:
    api = OpenAiApi(cast(Frontend, frontend), CollectorRegistry(), limit_s=limit_s)
    transport = httpx.ASGITransport(Starlette(routes=api.routes()))
    return httpx.AsyncClient(transport=transport, base_url="http://h")
