"""Paths, comments that keep a stream open, pages of other origins."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest

from coordinator.api.openai.keepalive import COMMENT, kept_alive
from tests.support.fake_decode import Cue
from tests.support.http_front import http_front, until

ORIGIN = {"origin": "https://chat.example.com"}


async def test_a_path_that_ends_in_a_slash():
    async with http_front() as f:
        await f.worker()
        listed = (await f.http.get("/v1/models")).json()
        assert (await f.http.get("/v1/models/")).json() == listed
        assert (await f.http.get("/v1/models/smollm2/")).json() == listed["data"][0]
        bodies = {
            "/v1/completions/": {"prompt": "Hello", "max_tokens": 1},
            "/v1/chat/completions/": {"messages": [{"role": "user", "content": "x"}]},
            "/tokenize/": {"prompt": "x"},
            "/detokenize/": {"tokens": [5]},
        }
        for path, body in bodies.items():
            assert (await f.http.post(path, json=body)).status_code == 200, path
        for path in ("/version/", "/openapi.json/", "/metrics/", "/health/", "/debug/holds/"):
            assert (await f.http.get(path)).status_code == 200, path
        for path in ("/v1", "/v1/", "/v1/nothing/"):
            got = await f.http.get(path)
            assert (got.status_code, "error" in got.json()) == (404, True)


# Comments


async def streamed(f, **body):
    """(status, text, whether the headers came before the first token) of a stream."""
    body = {"prompt": "Hello", "stream": True, "max_tokens": 3, **body}
    async with f.http.stream("POST", "/v1/completions", json=body) as response:
        return response.status_code, "".join([piece async for piece in response.aiter_text()])


async def test_comments_keep_a_stream_open_before_and_between_its_tokens():
    async with http_front(sse_keepalive_s=0.1) as f:
        await f.worker(pace_s=0.35, group=1)
        status, text = await streamed(f)
        assert status == 200
        lines = text.split("\n\n")
        assert lines[0] == COMMENT.strip()
        assert 4 <= lines.count(COMMENT.strip()) <= 12
        assert [line for line in lines if line.startswith("data: ")][-1] == "data: [DONE]"
        # Whole responses have no comments, and OpenAI's client ignores them.
        assert (await f.complete(max_tokens=1)).json()["choices"]
        base = f"http://{f.coordinator.http_address}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="x") as client:
            stream = await client.completions.create(
                model="smollm2", prompt="Hello", max_tokens=2, stream=True
            )
            texts = [chunk.choices[0].text async for chunk in stream]
        assert "".join(texts) == f.tokenizer.decode(f.workers[0].answer[:2])


async def test_comments_while_a_worker_is_waited_for():
    async with http_front(sse_keepalive_s=0.1) as f:
        stream = asyncio.create_task(streamed(f))
        await asyncio.sleep(0.35)
        await f.worker()
        status, text = await stream
        assert status == 200
        assert text.startswith(COMMENT * 2)
        assert text.endswith("data: [DONE]\n\n")


async def test_a_failure_after_a_comment_is_an_event_and_before_it_a_status():
    async with http_front(sse_keepalive_s=0.2, worker_wait_s=0.5) as f:
        status, text = await streamed(f)
        assert status == 200
        *_, error, done, _ = text.split("\n\n")
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "service_unavailable"
        assert done == "data: [DONE]"
        assert (await streamed(f, temperature=-1))[0] == 400


async def test_a_client_that_leaves_a_silent_stream_ends_its_request():
    async with http_front(sse_keepalive_s=0.1) as f:
        worker = await f.worker(pace_s=10)
        body = {"prompt": "Hello", "stream": True}
        async with f.http.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                assert line == COMMENT.strip()
                break
        await asyncio.wait_for(worker.cancelled.wait(), 1)
        labels = {"handler": "/v1/completions", "code": "499"}
        await until(lambda: f.sample("http_requests_total", **labels))


async def test_kept_alive_is_the_same_events():
    closed = asyncio.Event()

    async def events(error=None):
        try:
            for i in range(5):
                await asyncio.sleep(0.05 * (i == 2))
                yield f"{i}"
            if error:
                raise error
        finally:
            closed.set()

    got = [item async for item in kept_alive(events(), 0.02)]
    assert [item for item in got if item != COMMENT] == list("01234")
    assert got.count(COMMENT) >= 1
    with pytest.raises(KeyError):
        [_ async for _ in kept_alive(events(KeyError("x")), 10)]
    closed.clear()
    stream = kept_alive(events(), 10)
    assert await anext(stream) == "0"
    await stream.aclose()
    assert closed.is_set()


# Pages of other origins


def preflight(f, origin=ORIGIN, path="/v1/chat/completions"):
    asked = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    return f.http.options(path, headers={**origin, **asked})


async def test_pages_may_call_where_their_origin_is_named():
    async with http_front(cors_origins="https://a.example.com, https://chat.example.com") as f:
        await f.worker()
        got = await preflight(f)
        assert got.status_code == 200
        assert got.headers["access-control-allow-origin"] == ORIGIN["origin"]
        assert "POST" in got.headers["access-control-allow-methods"]
        assert "x-stainless-lang" in got.headers["access-control-allow-headers"]
        body = {"prompt": "Hello", "max_tokens": 1}
        asked = [
            f.http.post("/v1/completions", json=body, headers=ORIGIN),
            f.http.post("/v1/completions", json={**body, "stream": True}, headers=ORIGIN),
            f.http.post("/v1/completions", json={**body, "temperature": -1}, headers=ORIGIN),
            f.http.post("/v1/completions", json={**body, "model": "other"}, headers=ORIGIN),
            f.http.post("/v1/completions", content=b"{", headers=ORIGIN),
            f.http.get("/v1/completions", headers=ORIGIN),
            f.http.get("/nowhere", headers=ORIGIN),
        ]
        statuses = [200, 200, 400, 404, 415, 405, 404]
        for got, status in zip(await asyncio.gather(*asked), statuses, strict=True):
            assert got.status_code == status
            assert got.headers["access-control-allow-origin"] == ORIGIN["origin"]
            assert "x-request-id" in got.headers["access-control-expose-headers"].lower()
        other = {"origin": "https://evil.example.com"}
        assert "access-control-allow-origin" not in (await preflight(f, other)).headers
        got = await f.http.get("/v1/models", headers=other)
        assert got.status_code == 200
        assert "access-control-allow-origin" not in got.headers


async def test_a_bug_has_the_headers_too():
    async with http_front(cors_origins="*") as f:
        await f.worker(cues=[Cue(0, RuntimeError("secret"))] * 20)
        body = {"prompt": "Hello"}
        got = await f.http.post("/v1/completions", json=body, headers=ORIGIN)
        assert got.status_code == 500
        assert got.headers["access-control-allow-origin"] == "*"
        assert (await preflight(f)).headers["access-control-allow-origin"] == "*"


async def test_pages_are_kept_out_by_default():
    async with http_front() as f:
        got = await preflight(f)
        assert got.status_code == 405
        assert "access-control-allow-origin" not in got.headers
        got = await f.http.get("/v1/models", headers=ORIGIN)
        assert not [name for name in got.headers if name.startswith("access-control")]


async def test_connections_rest_for_the_time_of_the_option():
    async with http_front(http_keepalive_s=0.3) as f:
        host, _, port = f.coordinator.http_address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        got = await asyncio.wait_for(reader.read(), 3)
        assert got.endswith(b"ok\n")
        writer.close()
