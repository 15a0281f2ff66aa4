"""A coordinator with scripted decode workers, seen through its HTTP port and its gRPC port."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

import httpx

from coordinator.cluster.worker import Hello
from coordinator.server import Coordinator
from coordinator.text.chat_template import ChatTemplate
from coordinator.text.served_model import ServedModel
from coordinator.text.tokenizer import Tokenizer
from engine.base.option_groups import FrontOptions
from engine.base.types import PROTOCOL_VERSION, Role
from engine.checkpoint.source import resolve
from engine.pb.diptych.v1 import inference_pb2, inference_pb2_grpc
from engine.rpc.channel import open_channel
from tests.support.fake_decode import FakeDecode, identity
from tests.support.heartbeats import Heartbeats

TEXT = "The river was wide and slow, and nobody knew where it began. " * 4


@cache
def _loaded() -> tuple[Any, Tokenizer, ChatTemplate]:
    found = resolve("smollm2")
    return found, Tokenizer.load(found.folder), ChatTemplate.load(found.folder)


class HttpFront:
    """One coordinator, its HTTP client `http` and its gRPC stub `stub`."""

    def __init__(self, coordinator: Coordinator, http: httpx.AsyncClient, stub: Any) -> None:
        self.coordinator = coordinator
        self.http = http
        self.stub = stub
        self.tokenizer = coordinator.model.tokenizer
        self.workers: list[FakeDecode] = []
        self._hearts = Heartbeats(coordinator.membership)

    async def worker(
        self,
        text: str = TEXT,
        name: str = "d0",
        answer: list[int] | None = None,
        **script: Any,
    ) -> FakeDecode:
        """One that writes `text`, or these tokens."""
        worker = FakeDecode(answer or self.tokenizer.encode(text), name=name, **script)
        await worker.start(f"of-{name}")
        self.workers.append(worker)
        assert worker.peer is not None
        row = self.coordinator.membership.register(
            Hello(worker.peer, Role.DECODE, "", identity(), PROTOCOL_VERSION)
        )
        self._hearts.send(row)
        return worker

    async def close(self) -> None:
        await self._hearts.close()
        for worker in self.workers:
            await worker.stop()

    async def complete(self, **body: Any) -> httpx.Response:
        body.setdefault("prompt", "Hello")
        return await self.http.post("/v1/completions", json=body)

    async def chat(self, **body: Any) -> httpx.Response:
        body.setdefault("messages", [{"role": "user", "content": "Hello?"}])
        return await self.http.post("/v1/chat/completions", json=body)

    async def grpc_tokens(self, **fields: Any) -> list[int]:
        """Token ids of an answer by gRPC."""
        call = self.stub.Generate(inference_pb2.GenerateRequest(**fields), timeout=10)
        return [i async for response in call for i in response.delta.token_ids]

    def sample(self, name: str, **labels: str) -> float | None:
        return self.coordinator.registry.get_sample_value("diptych_" + name, labels)


async def until(check: Callable[[], Any], timeout_s: float = 5.0) -> None:
    """Poll; fails when the time is over."""
    ends_s = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < ends_s, "not within its time"
        await asyncio.sleep(0.01)


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The objects of a whole stream of server-sent events, which ends with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    datas = [line.removeprefix("data: ") for line in lines]
    assert datas[-1] == "[DONE]"
    return [json.loads(data) for data in datas[:-1]]


@asynccontextmanager
async def http_front(
    max_model_len: int = 0, own: Tokenizer | None = None, **options: Any
) -> AsyncIterator[HttpFront]:
    """With the tokenizer `own`, or the default model's."""
    options = {"listen": "127.0.0.1:0", "http": "127.0.0.1:0", "worker_wait_s": 5.0, **options}
    found, tokenizer, template = _loaded()
    model = ServedModel("smollm2", found.config, own or tokenizer, template, max_model_len)
    coordinator = Coordinator(FrontOptions(**options), model)
    await coordinator.start()
    channel = open_channel(coordinator.address)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    base = f"http://{coordinator.http_address}"
    async with httpx.AsyncClient(base_url=base, timeout=20) as http:
        it = HttpFront(coordinator, http, stub)
        try:
            yield it
            await until(coordinator.pipeline.idle.is_set, 2.0)  # every request was let go
        finally:
            await channel.close()
            await coordinator.stop()
            await it.close()
