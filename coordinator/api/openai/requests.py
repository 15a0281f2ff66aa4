"""The bodies of /v1/completions and /v1/chat/completions -> requests of the frontend. Pure.

    completions: a request a prompt        chat: one request

Types are checked by models.py; ranges by the frontend, whose errors name the same options.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from coordinator.api.openai.constraints import names_of, read_constraint
from coordinator.api.openai.decisions import (
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    IGNORED,
    NEUTRAL,
    Values,
)
from coordinator.api.openai.errors import unsupported
from coordinator.api.openai.messages import read_messages
from coordinator.api.openai.models import (
    MAX_PROMPTS,
    UINT32,
    UINT64,
    ChatBody,
    CommonBody,
    CompletionBody,
    NamedChoice,
    Tokens,
)
from coordinator.api.openai.read import check_rest, out_of_range, read
from coordinator.api.validation.bounds import check_count
from coordinator.api.validation.request import MAX_REQUEST_ID_CHARS
from coordinator.api.values import Constraint, GenerateRequest, Output, Sampling, Stop, ToolChoice
from engine.base.errors import InvalidRequest

MAX_REPEATED_BYTES = 16 * 1024 * 1024  # what all prompts' requests have in common, once a prompt
_ENTRY_BYTES = 8  # of a bias or a stop token
DEFAULT_MAX_TOKENS = 16
Prompt = str | list[int]
DEFAULT_TEMPERATURE = 1.0
Body = TypeVar("Body", bound=CommonBody)
Part = TypeVar("Part", Sampling, Stop, Output)


@dataclass(frozen=True, slots=True)
class Call:
    """A parsed body: a request for each prompt, or for the conversation."""

    body: CommonBody
    request_id: str
    requests: tuple[GenerateRequest, ...]
    logprobs: int | None  # alternatives shown with each token; None: no log-probabilities
    names: Mapping[str, str]  # of fields of a request, in the client's words

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with usage."""
        return bool(self.body.stream_options and self.body.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Whether each chunk has it too."""
        options = self.body.stream_options
        return bool(self.include_usage and options and options.continuous_usage_stats)

    def names_of(self, index: int) -> dict[str, str]:
        """The names for the request of prompt `index`."""
        prompt = "prompt" if len(self.requests) == 1 else f"prompt[{index}]"
        own = {"text": prompt, "token_ids.ids": prompt, "token_ids": prompt, "prompt": prompt}
        return {**own, **self.names}


def read_completion(values: Mapping[str, Any], request_id: str) -> Call:
    """Raises InvalidRequest, Refused."""
    if values.get("prompt") is None:
        raise InvalidRequest("prompt", "unset; expected text or token ids")
    body = read_body(CompletionBody, values, COMPLETION_NEUTRAL)
    prompts = _prompts(body.prompt)
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    echo = bool(body.echo)
    common = common_fields(body, max_tokens=max_tokens, logprobs=body.logprobs, echo=echo)
    constraint, option = read_constraint(body)
    _check_repeated(len(prompts), common, constraint)
    requests = []
    for i, prompt in enumerate(prompts):
        tail = f"-{i}" if len(prompts) > 1 else ""
        requests.append(
            GenerateRequest(
                **common,
                request_id=request_id[: MAX_REQUEST_ID_CHARS - len(tail)] + tail,
                text=prompt if isinstance(prompt, str) else None,
                token_ids=None if isinstance(prompt, str) else prompt,
                constraint=constraint,
            )
        )
    names = {"output.prompt_logprobs": "prompt_logprobs", **(names_of(option) if option else {})}
    if echo and body.prompt_logprobs is None:
        names["output.prompt_logprobs"] = "logprobs"
    return Call(body, request_id, tuple(requests), body.logprobs, names)


def _check_repeated(
    num_prompts: int, common: Mapping[str, Any], constraint: Constraint | None
) -> None:
    """Each prompt is a request of its own, which repeats biases, stops and the constraint."""
    stop, value = common["stop"], constraint.value if constraint else ()
    value = () if isinstance(value, bool) else value
    texts = [*stop.stop, *([value] if isinstance(value, str) else value)]
    size = _ENTRY_BYTES * (len(common["sampling"].logit_bias) + len(stop.stop_token_ids))
    size += sum(map(len, texts))
    if num_prompts > 1 and num_prompts * size > MAX_REPEATED_BYTES:
        raise InvalidRequest(
            "prompt",
            f"{num_prompts} prompts repeat {size} bytes of other fields each; expected at most"
            f" {MAX_REPEATED_BYTES} in sum",
        )


class _OnePrompt(msgspec.Struct):
    prompt: Tokens


class _Prompts(msgspec.Struct):
    prompt: list[str | Tokens]


def _prompts(value: str | list[Any]) -> list[Prompt]:
    """Text, texts, token ids, or lists of those: a list of prompts in any case."""
    if isinstance(value, str):
        return [value]
    expected = "expected text, token ids, or an array of either"
    if not value:
        raise InvalidRequest("prompt", expected)
    if isinstance(value[0], int) and not isinstance(value[0], bool):
        return [read(_OnePrompt, {"prompt": value}).prompt]
    check_count("prompt", len(value), MAX_PROMPTS, "prompts")
    for i, item in enumerate(value):
        if not isinstance(item, str | list):
            raise InvalidRequest(f"prompt[{i}]", expected)
    return list(read(_Prompts, {"prompt": value}).prompt)


def read_chat(values: Mapping[str, Any], request_id: str) -> Call:
    """Raises InvalidRequest, Refused."""
    body = read_body(ChatBody, values, CHAT_NEUTRAL)
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs", "only for requests with logprobs: true")
    limit, max_tokens = "max_completion_tokens", body.max_completion_tokens
    if max_tokens is None:
        limit, max_tokens = "max_tokens", body.max_tokens
    constraint, option = read_constraint(body)
    choice = _tool_choice(body.tool_choice)
    request = GenerateRequest(
        **common_fields(body, max_tokens=max_tokens, logprobs=logprobs),
        request_id=request_id,
        messages=read_messages(body.messages, values["messages"]),
        constraint=constraint,
        tools_json=tools_json(body.tools),
        template_kwargs_json=template_kwargs_json(body.chat_template_kwargs, body.reasoning_effort),
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
    )
    names = {
        **names_of(option or "tools"),  # which are a constraint, too
        "tools_json": "tools",
        "stop.max_tokens": limit,
        "output.logprobs": "top_logprobs",
        "output.prompt_logprobs": "prompt_logprobs",
        "tool_choice.name": "tool_choice.function.name",
        "template_kwargs_json": "chat_template_kwargs",
    }
    return Call(body, request_id, (request,), logprobs, names)


def tools_json(tools: Sequence[Any] | None) -> str:
    """Tool definitions as JSON; the frontend checks their content. Raises Refused."""
    for i, tool in enumerate(tools or ()):
        kind = tool.get("type") if isinstance(tool, dict) else "function"
        if isinstance(kind, str) and kind != "function":
            raise unsupported(f"tools[{i}].type", kind[:40])
    return json.dumps(tools) if tools else ""


def template_kwargs_json(values: Mapping[str, Any] | None, effort: str | None = None) -> str:
    """The variables of the template as JSON; the frontend checks them."""
    values = values or {}
    if effort is not None:
        values = {"reasoning_effort": effort, **values}
    return json.dumps(values) if values else ""


def _tool_choice(choice: str | NamedChoice | None) -> ToolChoice:
    if not isinstance(choice, NamedChoice):
        return ToolChoice(choice or "")
    if choice.type not in (None, "function"):
        raise unsupported("tool_choice.type", choice.type[:40])
    if not choice.function or not choice.function.name:
        raise InvalidRequest("tool_choice.function.name", "unset; expected the name of a tool")
    return ToolChoice(name=choice.function.name)


def read_body(model: type[Body], values: Mapping[str, Any], neutral: Mapping[str, Values]) -> Body:
    """The body of a completion or a chat; `neutral`: see decisions.py. Raises InvalidRequest."""
    body = read(model, values)
    if body.stream_options and not body.stream:
        raise InvalidRequest("stream_options", "only for requests with stream: true")
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs", "not available when streaming")
    check_rest(model, values, {**NEUTRAL, **neutral, "best_of": (1, body.n or 1)}, IGNORED)
    return body


def common_fields(
    body: CommonBody, *, max_tokens: int | None, logprobs: int | None, echo: bool = False
) -> dict[str, Any]:
    """Fields of a request that both APIs have. Raises InvalidRequest."""
    if body.cache_salt == "":
        raise InvalidRequest("cache_salt", "empty; expected text, or nothing at all")
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    prompt_logprobs = body.prompt_logprobs
    if prompt_logprobs is None and echo:
        prompt_logprobs = logprobs
    return {
        "model": body.model or "",
        "sampling": _sampling(body),
        "stop": _part(Stop, body, max_tokens=max_tokens, stop=stop or []),
        "output": _part(
            Output, body, logprobs=logprobs, prompt_logprobs=prompt_logprobs, echo=echo
        ),
        "n": body.n or 1,
        "priority": body.priority or 0,
        "cache_salt": body.cache_salt or "",
    }


def _part(kind: Callable[..., Part], body: CommonBody, **own: Any) -> Part:
    """A part of a request: its `own` fields, and the options that have the names of others."""
    names = kind.__annotations__.keys() - own.keys()
    found = {name: value for name in names if (value := getattr(body, name)) is not None}
    return kind(**found, **own)


def _sampling(body: CommonBody) -> Sampling:
    seed, top_p, top_k = body.seed, body.top_p, body.top_k
    if seed is not None and seed > UINT64:
        raise InvalidRequest("seed", out_of_range(seed, -(2**63), UINT64))
    if top_p == 0:  # OpenAI takes it: the likeliest token is always in
        top_p, top_k = None, 1
    return _part(
        Sampling,
        body,
        default_temperature=DEFAULT_TEMPERATURE,
        top_p=top_p,
        top_k=0 if top_k == -1 else top_k,  # vLLM's other value for off
        seed=None if seed is None or seed == -1 else seed % (UINT64 + 1),
        logit_bias=dict(_biases((body.logit_bias or {}).items())),
    )


def _biases(items: Iterable[tuple[str, float]]) -> Iterable[tuple[int, float]]:
    for key, value in items:
        path = f"logit_bias[{key[:20]}]"
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise InvalidRequest(path, "expected a token id")
        if int(key) > UINT32:
            raise InvalidRequest(path, out_of_range(int(key), 0, UINT32))
        yield int(key), value
