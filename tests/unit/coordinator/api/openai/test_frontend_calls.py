"""The HTTP API over a scripted frontend, without a coordinator, a socket or gRPC."""

from __future__ import annotations

import asyncio

import pytest

from coordinator.api.openai.calls import merged
from coordinator.api.openai.errors import Refused, failure_of
from coordinator.api.values import GenerateRequest
from coordinator.generation.events import Delta
from engine.base.errors import CheckpointError, DeadlineExceeded, InvalidRequest
from tests.support.scripted_frontend import ScriptedFrontend, client

BODY = {"prompt": "x", "max_tokens": 3}


async def test_every_endpoint_calls_the_frontend() -> None:
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


async def test_an_inner_cancellation_is_an_error() -> None:
    """As when the tokenizer's threads are closed: the response must not look complete."""

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
