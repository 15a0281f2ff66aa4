"""The HTTP API over a scripted frontend, without a coordinator, a socket or gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from coordinator.api.openai.api import OpenAiApi
from coordinator.api.openai.calls import merged
from coordinator.api.openai.errors import Refused, failure_of
from coordinator.api.values import Delta, Event, GenerateRequest, ModelCard, TokenizeRequest
from engine.base.errors import CheckpointError, DeadlineExceeded, InvalidRequest, NotFound
from tests.support.answer_events import finished

BODY = {"prompt": "x", "max_tokens": 3}


class ScriptedFrontend:
    """Says `events` to each request; `before` runs first, and may raise."""

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
    api = OpenAiApi(frontend, CollectorRegistry(), limit_s=limit_s)
    transport = httpx.ASGITransport(Starlette(routes=api.routes()))
    return httpx.AsyncClient(transport=transport, base_url="http://h")


async def test_everything_is_answered_by_the_frontend() -> None:
    frontend = ScriptedFrontend()
    async with client(frontend) as http:
        got = (await http.post("/v1/completions", json=BODY)).json()
        assert (got["model"], got["choices"][0]["text"]) == ("m", "ab")
        assert frontend.requests[0].text == "x"
        assert (await http.get("/v1/models/m")).json()["max_model_len"] == 100
        assert (await http.get("/v1/models/other")).status_code == 404
        got = (await http.post("/detokenize", json={"tokens": [5], "model": "m"})).json()
        assert got == {"prompt": "[5] of m"}
        messages = [{"role": "user", "content": "x"}]
        got = (await http.post("/tokenize", json={"messages": messages})).json()
        assert got["error"]["param"] == "messages[0].role"
    assert frontend.num_open == 0


async def test_a_request_is_ended_at_its_limit() -> None:
    frontend = ScriptedFrontend(lambda: asyncio.sleep(60))
    async with client(frontend, limit_s=0.05) as http:
        got = await http.post("/v1/completions", json=BODY)
        assert (got.status_code, got.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert frontend.num_open == 0


async def test_the_limit_holds_while_the_stream_is_not_read() -> None:
    frontend = ScriptedFrontend()
    frontend.events = [Delta(0, "a", [1])] * 1000  # more than wait for a reader
    stream = merged(frontend, [GenerateRequest(text="x")], lambda _: {}, 0.05)
    await anext(stream)
    await asyncio.sleep(0.2)
    assert frontend.num_open == 0
    with pytest.raises(DeadlineExceeded):
        async for _ in stream:
            pass


async def test_closing_a_stream_closes_all_its_calls() -> None:
    frontend = ScriptedFrontend()
    frontend.events = [Delta(0, "a", [1])] * 1000
    requests = [GenerateRequest(text="x") for _ in range(3)]
    stream = merged(frontend, requests, lambda _: {}, 5.0)
    await anext(stream)
    assert frontend.num_open == 3
    await stream.aclose()
    assert frontend.num_open == 0


async def test_what_is_cancelled_within_is_no_end_of_an_answer() -> None:
    """As when the tokenizer's threads are closed: the answer must not look complete."""

    def cancelled() -> None:
        raise asyncio.CancelledError

    async with client(ScriptedFrontend(cancelled)) as http:
        got = await http.post("/v1/completions", json=BODY)
        assert got.status_code == 503


async def test_bugs_are_not_shown_and_messages_are_short() -> None:
    def broken() -> None:
        raise RuntimeError("secret")

    async with client(ScriptedFrontend(broken)) as http:
        got = await http.post("/v1/completions", json=BODY)
        assert (got.status_code, "secret" in got.text) == (500, False)
    assert "secret" not in failure_of(CheckpointError("secret")).message

    def long() -> None:
        raise InvalidRequest("text", "x" * 100_000)

    async with client(ScriptedFrontend(long)) as http:
        got = await http.post("/v1/completions", json=BODY)
        assert got.json()["error"]["param"] == "prompt"
        assert len(got.json()["error"]["message"]) <= 1000
    with pytest.raises(Refused):
        async for _ in merged(ScriptedFrontend(long), [GenerateRequest()], lambda _: {}, 1.0):
            pass
