"""The body of /v1/completions -> one request a prompt. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coordinator.api.openai.constraints import names_of, read_constraint
from coordinator.api.openai.decisions import COMPLETION_NEUTRAL, IGNORED
from coordinator.api.openai.fields import UINT32, Fields, whole_list
from coordinator.api.openai.options import Wanted, read_common
from coordinator.api.validation.request import MAX_LOGPROBS, MAX_REQUEST_ID_CHARS
from coordinator.api.values import Constraint, GenerateRequest
from engine.base.errors import InvalidRequest

MAX_PROMPTS = 1024
MAX_REPEATED_BYTES = 16 * 1024 * 1024  # what all prompts' requests have in common, once a prompt
_ENTRY_BYTES = 8  # of a bias or a stop token
DEFAULT_MAX_TOKENS = 16
Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class CompletionCall:
    """What a client asked for."""

    requests: tuple[GenerateRequest, ...]  # one a prompt
    wanted: Wanted
    echo: bool
    max_tokens: int
    names: Mapping[str, str] = field(
        default_factory=dict
    )  # of fields of a request, in the client's words

    def names_of(self, index: int) -> dict[str, str]:
        """The names for the request of prompt `index`."""
        prompt = "prompt" if len(self.requests) == 1 else f"prompt[{index}]"
        own = {"text": prompt, "token_ids.ids": prompt, "token_ids": prompt, "prompt": prompt}
        return {**own, **self.names}


def read_completion(body: Mapping[str, Any], request_id: str) -> CompletionCall:
    """Raises InvalidRequest, Refused."""
    fields = Fields(body)
    prompts = _prompts(fields)
    max_tokens = fields.integer("max_tokens", 0, UINT32)
    max_tokens = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    echo = fields.boolean("echo")
    common = read_common(fields, request_id, max_tokens=max_tokens, logprobs=logprobs, echo=echo)
    constraint, asked = read_constraint(fields)
    fields.neutral({**COMPLETION_NEUTRAL, "best_of": (1, common.wanted.n)})
    fields.end(IGNORED)
    _check_repeated(len(prompts), common.request, constraint)
    requests = []
    for i, prompt in enumerate(prompts):
        name = common.wanted.request_id
        if len(prompts) > 1:
            tail = f"-{i}"
            name = name[: MAX_REQUEST_ID_CHARS - len(tail)] + tail
        given: dict[str, Any] = {"request_id": name}
        if isinstance(prompt, str):
            given["text"] = prompt
        else:
            given["token_ids"] = prompt
        requests.append(GenerateRequest(**common.request, **given, constraint=constraint))
    names = {"output.prompt_logprobs": "prompt_logprobs"}
    if asked:
        names.update(names_of(asked))
    if echo and common.wanted.prompt_logprobs is None:
        names["output.prompt_logprobs"] = "logprobs"
    return CompletionCall(tuple(requests), common.wanted, echo, max_tokens, names)


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


def _prompts(fields: Fields) -> list[Prompt]:
    """Text, texts, token ids, or lists of those: a list of prompts in any case."""
    value = fields.take("prompt")
    if value is None:
        raise InvalidRequest("prompt", "unset; expected text or token ids")
    if isinstance(value, str):
        return [value]
    expected = "expected text, token ids, or an array of either"
    if not isinstance(value, list) or not value:
        raise InvalidRequest("prompt", expected)
    if isinstance(value[0], int) and not isinstance(value[0], bool):
        return [whole_list("prompt", value, 0, UINT32)]
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest("prompt", f"{len(value)} prompts; expected at most {MAX_PROMPTS}")
    prompts: list[Prompt] = []
    for i, item in enumerate(value):
        if isinstance(item, str):
            prompts.append(item)
        elif isinstance(item, list):
            prompts.append(whole_list(f"prompt[{i}]", item, 0, UINT32))
        else:
            raise InvalidRequest(f"prompt[{i}]", expected)
    return prompts
