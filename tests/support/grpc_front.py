"""A coordinator over real gRPC with scripted decode workers, and a client's view of it."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2  # type: ignore[import-untyped]

from coordinator.cluster.worker import Hello
from coordinator.server import Coordinator
from coordinator.text.served_model import ServedModel
from engine.base.option_groups import FrontOptions
from engine.base.types import PROTOCOL_VERSION, Peer, Role
from engine.pb.diptych.v1 import inference_pb2, inference_pb2_grpc
from engine.rpc.channel import open_channel
from engine.rpc.status import DETAILS_KEY
from tests.support.fake_decode import FakeDecode, identity
from tests.support.heartbeats import Heartbeats

TEXT = "The river was wide and slow, and nobody knew where it began. " * 4
PROMPT = list(range(1000, 1040))  # two whole blocks and a tail


class Front:
    """A coordinator with scripted workers, and a client's view of it."""

    def __init__(self, coordinator: Coordinator, answer: list[int]) -> None:
        self.coordinator = coordinator
        self.answer = answer
        self.workers: list[FakeDecode] = []
        self.hearts = Heartbeats(coordinator.membership)
        self.channel = open_channel(coordinator.address)
        self.stub: Any = inference_pb2_grpc.InferenceServiceStub(self.channel)

    async def worker(
        self, name: str = "d0", incarnation: str = "", max_model_len: int = 8192, **script: Any
    ) -> FakeDecode:
        """A decode worker that follows `script`, registered and with heartbeats."""
        worker = FakeDecode(self.answer, name=name, **script)
        await worker.start(incarnation or f"of-{name}")
        self.workers.append(worker)
        assert worker.peer is not None
        model = identity(max_model_len=max_model_len)
        self._register(Hello(worker.peer, Role.DECODE, "", model, PROTOCOL_VERSION))
        return worker

    def prefill(self, name: str = "p0") -> None:
        """Register a prefill worker that does not exist."""
        peer = Peer(name, f"of-{name}", "127.0.0.1:1")
        self._register(Hello(peer, Role.PREFILL, "", identity(), PROTOCOL_VERSION))

    def _register(self, hello: Hello) -> None:
        self.hearts.send(self.coordinator.membership.register(hello))

    async def close(self) -> None:
        """End the coordinator and the workers."""
        await self.hearts.close()
        await self.channel.close()
        await self.coordinator.stop()
        for worker in self.workers:
            await worker.stop()

    def call(
        self, *, timeout: float = 10, prompt: str | Sequence[int] = PROMPT, **fields: Any
    ) -> Any:
        """Start a Generate call."""
        if isinstance(prompt, str):
            fields["text"] = prompt
        else:
            fields["token_ids"] = inference_pb2.TokenIds(ids=prompt)
        return self.stub.Generate(inference_pb2.GenerateRequest(**fields), timeout=timeout)

    async def ask(self, **fields: Any) -> tuple[str, list[int], inference_pb2.Finished]:
        """(text, token ids, Finished) of one answer."""
        return read(await collect(self.call(**fields)))

    def sample(self, name: str, **labels: str) -> float | None:
        """A metric of the coordinator."""
        labels["model_name"] = "smollm2"
        return self.coordinator.registry.get_sample_value("diptych_" + name, labels)


def read(responses: Sequence[Any]) -> tuple[str, list[int], inference_pb2.Finished]:
    """(text, token ids, Finished) of a whole stream."""
    deltas = [r.delta for r in responses if r.HasField("delta")]
    assert responses[-1].HasField("finished")
    text = "".join(d.text for d in deltas)
    return text, [i for d in deltas for i in d.token_ids], responses[-1].finished


async def collect(call: AsyncIterable[Any]) -> list[Any]:
    """Every message of a stream."""
    return [message async for message in call]


async def error_of(call: AsyncIterable[Any]) -> Any:
    """The status with which a stream fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await collect(call)
    return caught.value


def details_of(error: Any, kind: Any) -> Any:
    """The detail of a kind that a status carries."""
    metadata = dict(error.trailing_metadata())
    for detail in status_pb2.Status.FromString(metadata[DETAILS_KEY]).details:
        message = kind()
        if detail.Unpack(message):
            return message
    raise AssertionError(f"no {kind.__name__}")


@asynccontextmanager
async def front(checkpoint: Any, max_model_len: int = 0, **options: Any) -> AsyncIterator[Front]:
    """A coordinator whose workers answer `TEXT`; every request has ended when the block does."""
    options = {"listen": "127.0.0.1:0", "http": "127.0.0.1:0", "worker_wait_s": 5.0, **options}
    found, tokenizer, template = checkpoint
    model = ServedModel("smollm2", found.config, tokenizer, template, max_model_len)
    coordinator = Coordinator(FrontOptions(**options), model)
    await coordinator.start()
    it = Front(coordinator, model.tokenizer.encode(TEXT))
    try:
        yield it
        assert coordinator.pipeline.num_requests == 0, "a request was not let go"
        assert it.sample("num_requests_waiting") == 0
        assert it.sample("num_requests_running") == 0
    finally:
        await it.close()


def stop(**fields: Any) -> inference_pb2.Stop:
    """The field `stop` of a request."""
    return inference_pb2.Stop(**fields)
