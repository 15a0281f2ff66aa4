"""The endpoints: each calls the frontend and writes a response from the events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from starlette.routing import BaseRoute, Route

from coordinator.api.frontend import Frontend
from coordinator.api.openai.calls import in_words_of, merged
from coordinator.api.openai.chat_responses import ChatWriter
from coordinator.api.openai.completion_responses import CompletionWriter
from coordinator.api.openai.decisions import (
    TOKENIZE_CHAT_NEUTRAL,
    TOKENIZE_IGNORED,
    TOKENIZE_NEUTRAL,
)
from coordinator.api.openai.endpoint import (
    DONE,
    Endpoint,
    Events,
    Handler,
    ParsedRequest,
    Result,
    event,
    large_json,
)
from coordinator.api.openai.errors import Failure, Refused
from coordinator.api.openai.messages import read_messages
from coordinator.api.openai.models import DetokenizeBody, TokenizeChat, TokenizeText
from coordinator.api.openai.openapi import description, page
from coordinator.api.openai.read import check_rest, read
from coordinator.api.openai.requests import (
    Call,
    read_chat,
    read_completion,
    template_kwargs_json,
    tools_json,
)
from coordinator.api.openai.responses import Choice, Writer
from coordinator.api.values import GenerateRequest, ModelCard, TokenizeRequest
from coordinator.api.version import installed_version
from coordinator.generation.events import PromptEvent
from engine.base.errors import InvalidRequest
from engine.rpc.receive_budget import ReceiveBudget
from engine.telemetry.metrics import PREFIX

_OWNER = "diptych"
_MANY_LOGPROBS = 256  # of a prompt; more of them are written in a thread
_CHAT_NAMES = {
    "chat.messages": "messages",
    "chat.tools_json": "tools",
    "chat.template_kwargs_json": "chat_template_kwargs",
}


@dataclass(eq=False)
class OpenAiApi:
    """Serves HTTP from the frontend; lives on the event loop."""

    frontend: Frontend
    registry: CollectorRegistry
    limit_s: float  # of a request, also while its client does not read
    clock: Callable[[], float] = time.time
    sse_keepalive_s: float = 0.0
    budget: ReceiveBudget = field(default_factory=ReceiveBudget)

    def __post_init__(self) -> None:
        self._born = int(self.clock())
        self._counter = Counter(
            PREFIX + "http_requests",
            "HTTP requests by endpoint and status; 499: the client went away.",
            ("handler", "code"),
            registry=self.registry,
        )

    def routes(self) -> list[BaseRoute]:
        """All endpoints, for make_app."""

        def route(path: str, method: str, handler: Handler) -> Route:
            endpoint = Endpoint(
                path, method, handler, self._counter, self.sse_keepalive_s, self.budget
            )
            return Route(path, endpoint)

        complete = self._complete
        nowhere = Endpoint("other", "", self._nowhere, self._counter)
        return [
            route("/v1/completions", "POST", partial(complete, read_completion, CompletionWriter)),
            route("/v1/chat/completions", "POST", partial(complete, read_chat, ChatWriter)),
            route("/v1/models", "GET", self._models),
            route("/v1/models/{model:path}", "GET", self._model),
            route("/tokenize", "POST", self._tokenize),
            route("/detokenize", "POST", self._detokenize),
            route("/version", "GET", self._version),
            route("/openapi.json", "GET", self._openapi),
            route("/docs", "GET", self._docs),
            *(Route(path, nowhere) for path in ("/v1", "/v1/{path:path}")),
        ]

    async def _complete(
        self,
        read_call: Callable[[dict[str, Any], str], Call],
        make_writer: type[Writer],
        request: ParsedRequest,
    ) -> Result:
        call = await request.read_by(read_call)
        prompt_ids = None
        if call.body.return_token_ids or call.continuous_usage:
            prompt_ids = [
                await self._prompt_ids(one, {**call.names_of(i), **_CHAT_NAMES})
                for i, one in enumerate(call.requests)
            ]
        model = request.body.get("model") or self.frontend.model().name
        created = int(self.clock())
        writer = make_writer(call=call, model=model, created=created, prompt_ids=prompt_ids)
        parts = self._parts(writer, call)
        if call.body.stream:
            return _events(writer, parts)
        choices: dict[int, Choice] = {}
        async with aclosing(parts):
            async for some in parts:
                for part in some:
                    choices[part["index"]] = writer.fold(choices.get(part["index"]), part)
        whole = writer.whole(choices)
        return await asyncio.to_thread(large_json, whole) if writer.is_large else whole

    async def _parts(self, writer: Writer, call: Call) -> AsyncGenerator[list[Choice], None]:
        """The choices that each event adds."""
        output = call.requests[0].output
        needs_first = output.echo and output.logprobs is not None
        answers = merged(self.frontend, call.requests, call.names_of, self.limit_s)
        async with aclosing(answers) as events:
            async for prompt, event in events:
                first_text = ""
                scored = event.logprobs if isinstance(event, PromptEvent) else ()
                if needs_first and isinstance(event, PromptEvent):
                    with in_words_of({}):
                        first_text = await self.frontend.detokenize(event.token_ids[:1])
                if len(scored) > _MANY_LOGPROBS:  # a quarter of a second's work
                    writer.is_large = True
                    yield await asyncio.to_thread(writer.choices, prompt, event, first_text)
                else:
                    yield writer.choices(prompt, event, first_text)

    async def _prompt_ids(
        self, request: GenerateRequest, names: Mapping[str, str]
    ) -> Sequence[int]:
        if request.token_ids is not None:
            return request.token_ids
        no_tools = request.tool_choice.mode == "none"  # then the prompt names no tools
        tokenize = TokenizeRequest(
            model=request.model,
            text=request.text,
            messages=request.messages,
            tools_json="" if no_tools else request.tools_json,
            template_kwargs_json=request.template_kwargs_json,
        )
        with in_words_of(names):
            return await self.frontend.tokenize(tokenize)

    async def _models(self, request: ParsedRequest) -> Result:
        return {"object": "list", "data": [self._card(self.frontend.model())]}

    async def _model(self, request: ParsedRequest) -> Result:
        return self._card(self.frontend.model(request.path["model"]))

    def _card(self, model: ModelCard) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._born,
            "owned_by": _OWNER,
            "root": model.name,
            "parent": None,
            "max_model_len": model.max_model_len,
        }

    async def _tokenize(self, request: ParsedRequest) -> Result:
        values = request.body
        if values.get("messages") is not None:
            chat = read(TokenizeChat, values)
            check_rest(TokenizeChat, values, TOKENIZE_CHAT_NEUTRAL, TOKENIZE_IGNORED, nulls=True)
            tokenize = TokenizeRequest(
                model=chat.model or "",
                messages=read_messages(chat.messages, values["messages"]),
                tools_json=tools_json(chat.tools),
                template_kwargs_json=template_kwargs_json(chat.chat_template_kwargs),
                add_generation_prompt=chat.add_generation_prompt is not False,
            )
        else:
            if values.get("prompt") is None:
                raise InvalidRequest("prompt", "unset; expected text, or messages in its place")
            text = read(TokenizeText, values)
            check_rest(TokenizeText, values, TOKENIZE_NEUTRAL, TOKENIZE_IGNORED, nulls=True)
            special = text.add_special_tokens is not False
            tokenize = TokenizeRequest(text.model or "", text.prompt, special)
        with in_words_of({**_CHAT_NAMES, "text": "prompt"}):
            ids = await self.frontend.tokenize(tokenize)
        limit = self.frontend.model().max_model_len
        return {"count": len(ids), "max_model_len": limit, "tokens": ids}

    async def _detokenize(self, request: ParsedRequest) -> Result:
        body = read(DetokenizeBody, request.body)
        check_rest(DetokenizeBody, request.body, {}, ())
        with in_words_of({"token_ids": "tokens"}):
            return {"prompt": await self.frontend.detokenize(body.tokens, body.model or "")}

    async def _version(self, request: ParsedRequest) -> Result:
        return {"version": installed_version()}

    async def _openapi(self, request: ParsedRequest) -> Result:
        return description(installed_version())

    async def _docs(self, request: ParsedRequest) -> Result:
        return page(description(installed_version()))

    async def _nowhere(self, request: ParsedRequest) -> Result:
        raise Refused(Failure(404, "nothing is served here; see /openapi.json"))


async def _events(writer: Writer, parts: AsyncGenerator[list[Choice], None]) -> Events:
    """An output as server-sent events: one a choice and event, usage, [DONE]."""
    async with aclosing(parts):
        async for some in parts:
            # One write for an event: a client that has its tokens has all of them.
            if some:
                yield "".join(event(writer.chunk([choice])) for choice in some)
    if writer.call.include_usage:
        yield event(writer.chunk([], last=True))
    yield DONE
