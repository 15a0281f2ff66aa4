"""Options that completions and chat share -> parts of a request. Pure.

Types are checked by models.py; ranges by the frontend, whose errors name the same options.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from coordinator.api.openai.models import UINT32, UINT64, CommonBody
from coordinator.api.openai.read import out_of_range
from coordinator.api.values import GenerateRequest, Output, Sampling, Stop
from engine.base.errors import InvalidRequest

DEFAULT_TEMPERATURE = 1.0


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


def check_stream(body: CommonBody) -> None:
    """Check options that depend on `stream`. Raises InvalidRequest."""
    if body.stream_options and not body.stream:
        raise InvalidRequest("stream_options", "only for requests with stream: true")
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs", "not available when streaming")


def common_fields(
    body: CommonBody, *, max_tokens: int | None, logprobs: int | None, echo: bool = False
) -> dict[str, Any]:
    """Fields of a request that both APIs have. Raises InvalidRequest."""
    if body.cache_salt == "":
        raise InvalidRequest("cache_salt", "empty; expected text, or nothing at all")
    prompt_logprobs = body.prompt_logprobs
    return {
        "model": body.model or "",
        "sampling": _sampling(body),
        "stop": Stop(
            max_tokens=max_tokens,
            min_tokens=body.min_tokens or 0,
            stop=[body.stop] if isinstance(body.stop, str) else body.stop or [],
            stop_token_ids=body.stop_token_ids or [],
            ignore_eos=bool(body.ignore_eos),
            include_stop_str_in_output=bool(body.include_stop_str_in_output),
        ),
        "output": Output(
            logprobs=logprobs,
            prompt_logprobs=logprobs if prompt_logprobs is None and echo else prompt_logprobs,
            echo=echo,
            skip_special_tokens=body.skip_special_tokens is not False,
        ),
        "n": body.n or 1,
        "priority": body.priority or 0,
        "cache_salt": body.cache_salt or "",
    }


def _sampling(body: CommonBody) -> Sampling:
    seed, top_p, top_k = body.seed, body.top_p, body.top_k
    if seed is not None and seed > UINT64:
        raise InvalidRequest("seed", out_of_range(seed, -(2**63), UINT64))
    if top_p == 0:  # OpenAI takes it: the likeliest token is always in
        top_p, top_k = None, 1
    return Sampling(
        temperature=DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
        top_p=top_p,
        top_k=0 if top_k == -1 else top_k,  # vLLM's other value for off
        min_p=body.min_p,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        repetition_penalty=body.repetition_penalty,
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
