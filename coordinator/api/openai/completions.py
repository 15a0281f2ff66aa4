"""The body of /v1/completions -> one request a prompt. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from coordinator.api.openai.constraints import names_of, read_constraint
from coordinator.api.openai.decisions import COMPLETION_NEUTRAL
from coordinator.api.openai.models import CompletionBody, Tokens
from coordinator.api.openai.options import Call, common_fields, read_body
from coordinator.api.openai.read import read
from coordinator.api.validation.bounds import check_count
from coordinator.api.validation.request import MAX_REQUEST_ID_CHARS
from coordinator.api.values import Constraint, GenerateRequest
from engine.base.errors import InvalidRequest

MAX_PROMPTS = 1024
MAX_REPEATED_BYTES = 16 * 1024 * 1024  # what all prompts' requests have in common, once a prompt
_ENTRY_BYTES = 8  # of a bias or a stop token
DEFAULT_MAX_TOKENS = 16
Prompt = str | list[int]


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
