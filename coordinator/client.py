"""A small client library: what the command line uses, and what a script may.

    with Client("127.0.0.1:50051") as client:
        for event in client.generate("Once upon a time", max_tokens=64, temperature=0.8):
            ...                                                  # TextDelta, ..., Done

Before the first token gRPC itself tries again where a coordinator is away or tells it to come back.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc

from engine.errors import DeadlineExceeded, DiptychError
from engine.pb.diptych.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc
from engine.rpc.channel import CHANNEL_OPTIONS, open_channel
from engine.rpc.status import from_rpc_error

_RETRY_POLICY = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{"service": "diptych.v1.InferenceService"}],
                "retryPolicy": {
                    "maxAttempts": 5,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
                },
            }
        ]
    }
)
_OPTION = ("grpc.service_config", _RETRY_POLICY)
_SAMPLING = frozenset(f.name for f in inference_pb2.Sampling.DESCRIPTOR.fields)
_STOP = frozenset(f.name for f in inference_pb2.Stop.DESCRIPTOR.fields)
_PLAIN = frozenset(("request_id", "model", "priority", "cache_salt"))


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that became final, and its tokens."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer."""

    finish_reason: str  # "stop", "length" or "aborted"
    request_id: str
    usage: inference_pb2.Usage
    timing: inference_pb2.Timing


AnswerEvent = TextDelta | Done


def generate_request(prompt: str | Sequence[int], **options: Any) -> inference_pb2.GenerateRequest:
    """A request for text or token ids; `options`: fields of sampling, stop and request by name."""
    common = _common(options)
    if isinstance(prompt, str):
        return inference_pb2.GenerateRequest(text=prompt, **common)
    ids = inference_pb2.TokenIds(ids=prompt)
    return inference_pb2.GenerateRequest(token_ids=ids, **common)


def chat_request(
    messages: Sequence[Mapping[str, str]], **options: Any
) -> inference_pb2.ChatRequest:
    """A request for the next turn of `messages` of role and content."""
    turns = [inference_pb2.Message(role=m["role"], content=m["content"]) for m in messages]
    return inference_pb2.ChatRequest(messages=turns, **_common(options))


def _common(options: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword options, None left out, sorted into the messages that they belong to."""
    given = {key: value for key, value in options.items() if value is not None}
    if unknown := given.keys() - _SAMPLING - _STOP - _PLAIN:
        raise TypeError(f"unknown option {sorted(unknown)[0]!r}")
    sampling = {key: value for key, value in given.items() if key in _SAMPLING}
    stop = {key: value for key, value in given.items() if key in _STOP}
    return {
        "sampling": inference_pb2.Sampling(**sampling),
        "stop": inference_pb2.Stop(**stop),
        **{key: value for key, value in given.items() if key in _PLAIN},
    }


def _event(response: inference_pb2.GenerateResponse) -> AnswerEvent:
    if response.HasField("delta"):
        return TextDelta(response.delta.text, tuple(response.delta.token_ids))
    finished = response.finished
    name = inference_pb2.FinishReason.Name(finished.finish_reason)
    reason = name.removeprefix("FINISH_REASON_").lower()
    return Done(reason, response.request_id, finished.usage, finished.timing)


def _meaning(error: grpc.RpcError) -> Exception:
    return from_rpc_error(error) or error


class Client:
    """Blocking calls. Errors are DiptychError where the server meant one, else grpc.RpcError."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=(*CHANNEL_OPTIONS, _OPTION))
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)

    def generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **options: Any
    ) -> Iterator[AnswerEvent]:
        """Stream a completion; closing the iterator cancels it."""
        call = self._inference.Generate(generate_request(prompt, **options), timeout=timeout_s)
        return self._events(call)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Iterator[AnswerEvent]:
        """Stream the next turn of a conversation; closing the iterator cancels it."""
        call = self._inference.Chat(chat_request(messages, **options), timeout=timeout_s)
        return self._events(call)

    def model(self, *, timeout_s: float = 10.0) -> inference_pb2.Model:
        """The served model."""
        try:
            request = inference_pb2.GetModelRequest()
            model: inference_pb2.Model = self._inference.GetModel(request, timeout=timeout_s)
            return model
        except grpc.RpcError as error:
            raise _meaning(error) from None

    def workers(self, *, timeout_s: float = 10.0) -> Sequence[admin_pb2.Worker]:
        """The workers that the coordinator knows."""
        try:
            request = admin_pb2.ListWorkersRequest()
            return list(self._admin.ListWorkers(request, timeout=timeout_s).workers)
        except grpc.RpcError as error:
            raise _meaning(error) from None

    def close(self) -> None:
        """Close the connection; calls on it are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _events(self, call: Any) -> Iterator[AnswerEvent]:
        try:
            for response in call:
                yield _event(response)
        except grpc.RpcError as error:
            raise _meaning(error) from None
        finally:
            call.cancel()


class AsyncClient:
    """The same for asyncio."""

    def __init__(self, address: str) -> None:
        self._channel = open_channel(address, _OPTION)
        self._inference: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def generate(
        self, prompt: str | Sequence[int], *, timeout_s: float | None = None, **options: Any
    ) -> AsyncIterator[AnswerEvent]:
        """Stream a completion; closing the iterator cancels it."""
        call = self._inference.Generate(generate_request(prompt, **options), timeout=timeout_s)
        return self._events(call)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> AsyncIterator[AnswerEvent]:
        """Stream the next turn of a conversation; closing the iterator cancels it."""
        call = self._inference.Chat(chat_request(messages, **options), timeout=timeout_s)
        return self._events(call)

    async def close(self) -> None:
        """Close the connection; calls on it are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _events(self, call: Any) -> AsyncIterator[AnswerEvent]:
        try:
            async for response in call:
                yield _event(response)
        except grpc.aio.AioRpcError as error:
            raise _meaning(error) from None
        finally:
            call.cancel()


def describe(error: BaseException) -> str:
    """One sentence for a person about a failed call."""
    if isinstance(error, DeadlineExceeded):
        return "the call's time ran out"
    if isinstance(error, DiptychError):
        return error.message
    call: Any = error
    return (
        f"{call.code().name}: {call.details()}" if isinstance(error, grpc.RpcError) else str(error)
    )
