"""The endpoints: each a few calls of the gRPC API and an answer written from them.

Owns the channel to the coordinator's own public address, over which it is a client like any other:
without retries, which are its own clients' decision.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from starlette.routing import BaseRoute, Route

from coordinator.api.openai.calls import Names, merged, starts, unary
from coordinator.api.openai.chat_responses import ChatWriter
from coordinator.api.openai.chats import read_chat, read_tools
from coordinator.api.openai.completion_responses import CompletionWriter
from coordinator.api.openai.completions import read_completion
from coordinator.api.openai.endpoint import (
    DONE,
    Endpoint,
    Events,
    Handler,
    ParsedRequest,
    Response,
    event,
    large_json,
)
from coordinator.api.openai.errors import Failure, Refused
from coordinator.api.openai.fields import UINT32, Fields, whole_list
from coordinator.api.openai.messages import read_messages
from coordinator.api.openai.openapi import description
from coordinator.api.openai.responses import Choice, Writer
from engine.base.errors import InvalidRequest
from engine.pb.diptych.v1 import inference_pb2, inference_pb2_grpc
from engine.rpc.channel import open_channel
from engine.rpc.receive_budget import ReceiveBudget
from engine.telemetry.metrics import PREFIX

_OWNER = "diptych"
_MANY_LOGPROBS = 256  # of tokens of a prompt, beyond which they are written in a thread
_CHAT_NAMES = {"chat.messages": "messages", "chat.tools_json": "tools", "text": "prompt"}


class OpenAiApi:
    """Serves HTTP from the gRPC API at `address`; lives on the event loop."""

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.time,
        *,
        sse_keepalive_s: float = 0.0,
        budget: ReceiveBudget | None = None,
    ) -> None:
        self._budget = budget
        self._channel = open_channel(address, ("grpc.enable_retries", 0))
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._clock = clock
        self._sse_keepalive_s = sse_keepalive_s
        self._born = int(clock())
        self._counter = Counter(
            PREFIX + "http_requests",
            "HTTP requests by endpoint and status; 499: the client went away.",
            ("handler", "code"),
            registry=registry,
        )

    async def close(self) -> None:
        """Close the channel; calls on it are cancelled."""
        await self._channel.close()

    def routes(self) -> list[BaseRoute]:
        """All endpoints, for make_app."""

        def route(path: str, method: str, handler: Handler) -> Route:
            endpoint = Endpoint(
                path, method, handler, self._counter, self._sse_keepalive_s, self._budget
            )
            return Route(path, endpoint)

        nowhere = Endpoint("other", "", self._nowhere, self._counter)
        return [
            route("/v1/completions", "POST", self._completions),
            route("/v1/chat/completions", "POST", self._chat),
            route("/v1/models", "GET", self._models),
            route("/v1/models/{model:path}", "GET", self._model),
            route("/tokenize", "POST", self._tokenize),
            route("/detokenize", "POST", self._detokenize),
            route("/version", "GET", self._version),
            route("/openapi.json", "GET", self._openapi),
            *(Route(path, nowhere) for path in ("/v1", "/v1/{path:path}")),
        ]

    async def _completions(self, asked: ParsedRequest) -> Response:
        call = await asked.read_by(read_completion)
        wanted = call.wanted
        prompt_ids = None
        if wanted.token_ids or wanted.continuous_usage:
            prompt_ids = [
                await self._prompt_ids(request, call.names_of(i))
                for i, request in enumerate(call.requests)
            ]
        writer = CompletionWriter(
            call,
            model=await self._model_name(asked.body),
            created=int(self._clock()),
            prompt_ids=prompt_ids,
        )
        needs_first = call.echo and wanted.logprobs is not None
        calls = starts(self._stub.Generate, call.requests)
        return await self._answer(writer, calls, call.names_of, needs_first)

    async def _chat(self, asked: ParsedRequest) -> Response:
        call = await asked.read_by(read_chat)
        prompt_ids = None
        if call.wanted.token_ids or call.wanted.continuous_usage:
            prompt_ids = [await self._conversation_ids(call.request, call.names)]
        writer = ChatWriter(
            call,
            model=await self._model_name(asked.body),
            created=int(self._clock()),
            prompt_ids=prompt_ids,
        )
        calls = starts(self._stub.Chat, [call.request])
        return await self._answer(writer, calls, lambda _: call.names, False)

    async def _answer(
        self, writer: Writer, calls: Sequence[Callable[[], Any]], names: Names, needs_first: bool
    ) -> Response:
        parts = self._parts(writer, calls, names, needs_first)
        if writer.wanted.stream:
            return _events(writer, parts)
        choices: dict[int, Choice] = {}
        async with aclosing(parts):
            async for some in parts:
                for part in some:
                    choices[part["index"]] = writer.fold(choices.get(part["index"]), part)
        whole = writer.whole(choices)
        return await asyncio.to_thread(large_json, whole) if writer.is_large else whole

    async def _parts(
        self, writer: Writer, calls: Sequence[Callable[[], Any]], names: Names, needs_first: bool
    ) -> AsyncGenerator[list[Choice], None]:
        """What each response adds to the answer."""
        async with aclosing(merged(calls, names)) as responses:
            async for prompt, response in responses:
                first_text = ""
                if needs_first and response.HasField("prompt"):
                    first_text = await self._text_of(response.prompt.token_ids[:1])
                if len(response.prompt.logprobs) > _MANY_LOGPROBS:  # a quarter of a second's work
                    writer.is_large = True
                    yield await asyncio.to_thread(writer.choices, prompt, response, first_text)
                else:
                    yield writer.choices(prompt, response, first_text)

    async def _text_of(self, token_ids: Sequence[int]) -> str:
        request = inference_pb2.DetokenizeRequest(token_ids=token_ids)
        text: str = (await unary(self._stub.Detokenize(request), {})).text
        return text

    async def _prompt_ids(
        self, request: inference_pb2.GenerateRequest, names: Mapping[str, str]
    ) -> Sequence[int]:
        if request.HasField("token_ids"):
            return list(request.token_ids.ids)
        asked = inference_pb2.TokenizeRequest(model=_model_of(request), text=request.text)
        return list((await unary(self._stub.Tokenize(asked), names)).token_ids)

    async def _conversation_ids(
        self, request: inference_pb2.ChatRequest, names: Mapping[str, str]
    ) -> Sequence[int]:
        none = inference_pb2.ToolChoice.MODE_NONE  # then the prompt tells of no tools
        tools = None if request.tool_choice.mode == none else request.tools_json or None
        chat = inference_pb2.ChatMessages(messages=request.messages, tools_json=tools)
        asked = inference_pb2.TokenizeRequest(model=_model_of(request), chat=chat)
        names = {**names, **_CHAT_NAMES}
        return list((await unary(self._stub.Tokenize(asked), names)).token_ids)

    async def _model_name(self, body: Mapping[str, Any]) -> str:
        """What the client called it, or its name."""
        if name := body.get("model"):
            return str(name)
        request = inference_pb2.GetModelRequest()
        model: inference_pb2.Model = await unary(self._stub.GetModel(request), {})
        return model.name

    async def _models(self, asked: ParsedRequest) -> Response:
        request = inference_pb2.ListModelsRequest()
        models = (await unary(self._stub.ListModels(request), {})).models
        return {"object": "list", "data": [self._card(model) for model in models]}

    async def _model(self, asked: ParsedRequest) -> Response:
        request = inference_pb2.GetModelRequest(model=asked.path["model"])
        return self._card(await unary(self._stub.GetModel(request), {}))

    def _card(self, model: inference_pb2.Model) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._born,
            "owned_by": _OWNER,
            "root": model.name,
            "parent": None,
            "max_model_len": model.max_model_len,
        }

    async def _tokenize(self, asked: ParsedRequest) -> Response:
        fields = Fields(asked.body)
        request = inference_pb2.TokenizeRequest(model=fields.text("model"))
        if fields.take("messages") is not None:
            fields.neutral({"continue_final_message": (False,), "add_special_tokens": (False,)})
            request.chat.CopyFrom(
                inference_pb2.ChatMessages(
                    messages=read_messages(fields),
                    tools_json=read_tools(fields),
                    add_generation_prompt=fields.boolean("add_generation_prompt", True),
                )
            )
            fields.neutral({"chat_template": (), "chat_template_kwargs": ({},)})
        else:
            prompt = fields.text("prompt")
            if prompt is None:
                raise InvalidRequest("prompt", "unset; expected text, or messages in its place")
            request.text = prompt
            request.add_special_tokens = fields.boolean("add_special_tokens", True)
        fields.neutral({"return_token_strs": (False,)})
        fields.end(("media_io_kwargs", "mm_processor_kwargs"), nulls=True)
        response = await unary(self._stub.Tokenize(request), _CHAT_NAMES)
        ids = list(response.token_ids)
        return {"count": len(ids), "max_model_len": response.max_model_len, "tokens": ids}

    async def _detokenize(self, asked: ParsedRequest) -> Response:
        fields = Fields(asked.body)
        ids = whole_list("tokens", fields.take("tokens"), 0, UINT32)
        request = inference_pb2.DetokenizeRequest(model=fields.text("model"), token_ids=ids)
        fields.end()
        response = await unary(self._stub.Detokenize(request), {"token_ids": "tokens"})
        return {"prompt": response.text}

    async def _version(self, asked: ParsedRequest) -> Response:
        return {"version": _version()}

    async def _openapi(self, asked: ParsedRequest) -> Response:
        return description(_version())

    async def _nowhere(self, asked: ParsedRequest) -> Response:
        raise Refused(Failure(404, "nothing is served here; see /openapi.json"))


async def _events(writer: Writer, parts: AsyncGenerator[list[Choice], None]) -> Events:
    """An answer as server-sent events: one a choice and response, usage, [DONE]."""
    async with aclosing(parts):
        async for some in parts:
            # One event for a response: whoever has its tokens has them all.
            if some:
                yield "".join(event(writer.chunk([choice])) for choice in some)
    if writer.wanted.include_usage:
        yield event(writer.chunk([], last=True))
    yield DONE


def _model_of(request: Any) -> str | None:
    return request.model if request.HasField("model") else None


def _version() -> str:
    try:
        return version("diptych")
    except PackageNotFoundError:  # run from a folder, not installed
        return "0"
