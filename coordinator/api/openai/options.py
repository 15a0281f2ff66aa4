"""Options that completions and chat share -> parts of a request. Pure.

Types are checked by models.py; ranges by the frontend, whose errors name the same options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from coordinator.api.openai.decisions import IGNORED, NEUTRAL, Values
from coordinator.api.openai.models import UINT32, UINT64, CommonBody
from coordinator.api.openai.read import check_rest, out_of_range, read
from coordinator.api.values import GenerateRequest, Output, Sampling, Stop
from engine.base.errors import InvalidRequest

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
        temperature=DEFAULT_TEMPERATURE if body.temperature is None else body.temperature,
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
