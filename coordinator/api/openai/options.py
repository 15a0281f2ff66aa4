"""Options that completions and chat share -> parts of a request. Pure.

Types are checked here; ranges are checked by the frontend, whose errors name the same options.

What becomes of each option is listed in decisions.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coordinator.api import values
from coordinator.api.openai.decisions import NEUTRAL
from coordinator.api.openai.fields import UINT32, Fields, real, whole, whole_list
from coordinator.api.validation.request import MAX_CHOICES, MAX_LOGPROBS
from engine.base.errors import InvalidRequest

DEFAULT_TEMPERATURE = 1.0
_INT64, _UINT64 = 2**63, 2**64


@dataclass(frozen=True, slots=True)
class Wanted:
    """How the answers are to be written; what the request does not carry."""

    request_id: str
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    logprobs: int | None  # alternatives shown with each token; None: no log-probabilities
    prompt_logprobs: int | None
    stop_token_ids: frozenset[int]  # that the client named: told as `stop_reason`
    token_ids: bool  # show ids of prompt and answer
    tokens_as_ids: bool  # name tokens by id where log-probabilities are shown


@dataclass(frozen=True, slots=True)
class Common:
    """What was read: fields of a request, and how to write its answers."""

    request: dict[str, Any]
    wanted: Wanted


def read_common(
    fields: Fields,
    request_id: str,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    echo: bool = False,
) -> Common:
    """All options that both APIs have. Raises InvalidRequest, Refused."""
    fields.text("request_id")  # known to the endpoint already
    stream = fields.boolean("stream")
    include, continuous = _stream_options(fields, stream)
    prompt_logprobs = fields.integer("prompt_logprobs", 0, MAX_LOGPROBS)
    if stream and prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs", "not available when streaming")
    n = fields.integer("n", 1, MAX_CHOICES)
    stop = _stop(fields, max_tokens)
    output = values.Output(
        logprobs=logprobs,
        prompt_logprobs=logprobs if prompt_logprobs is None and echo else prompt_logprobs,
        echo=echo,
        skip_special_tokens=fields.boolean("skip_special_tokens", True),
    )
    request = {
        "model": fields.text("model") or "",
        "sampling": _sampling(fields),
        "stop": stop,
        "output": output,
        "n": n or 1,
        "priority": fields.integer("priority", -(2**31), 2**31 - 1) or 0,
        "cache_salt": _cache_salt(fields),
    }
    wanted = Wanted(
        request_id=request_id,
        n=n or 1,
        stream=stream,
        include_usage=include,
        continuous_usage=continuous,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop_token_ids=frozenset(stop.stop_token_ids),
        token_ids=fields.boolean("return_token_ids"),
        tokens_as_ids=fields.boolean("return_tokens_as_token_ids"),
    )
    fields.neutral(NEUTRAL)
    return Common(request, wanted)


def _stream_options(fields: Fields, stream: bool) -> tuple[bool, bool]:
    options = fields.object("stream_options")
    if options is None:
        return False, False
    if not stream:
        raise InvalidRequest("stream_options", "only for requests with stream: true")
    include = options.boolean("include_usage")
    continuous = options.boolean("continuous_usage_stats")
    options.end(("include_obfuscation",))
    return include, include and continuous


def _sampling(fields: Fields) -> values.Sampling:
    temperature = fields.number("temperature")
    seed = fields.integer("seed", -_INT64, _UINT64 - 1)
    top_k = fields.integer("top_k", -1, UINT32)
    top_p = fields.number("top_p")
    if top_p == 0:  # OpenAI takes it: the likeliest token is always in
        top_p, top_k = None, 1
    return values.Sampling(
        temperature=DEFAULT_TEMPERATURE if temperature is None else temperature,
        top_p=top_p,
        top_k=0 if top_k == -1 else top_k,  # vLLM's other way to say off
        min_p=fields.number("min_p"),
        frequency_penalty=fields.number("frequency_penalty"),
        presence_penalty=fields.number("presence_penalty"),
        repetition_penalty=fields.number("repetition_penalty"),
        seed=None if seed is None or seed == -1 else seed % _UINT64,
        logit_bias=_logit_bias(fields),
    )


def _logit_bias(fields: Fields) -> dict[int, float]:
    values = fields.take("logit_bias")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InvalidRequest("logit_bias", "expected an object of token ids and numbers")
    out = {}
    for key, value in values.items():
        path = f"logit_bias[{key[:20]}]"
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise InvalidRequest(path, "expected a token id")
        out[whole(path, int(key), 0, UINT32)] = real(path, value)
    return out


def _stop(fields: Fields, max_tokens: int | None) -> values.Stop:
    strings = fields.take("stop")
    if isinstance(strings, str):
        strings = [strings]
    if strings is not None and not (
        isinstance(strings, list) and all(isinstance(s, str) for s in strings)
    ):
        raise InvalidRequest("stop", "expected text or an array of texts")
    ids = fields.take("stop_token_ids")
    return values.Stop(
        max_tokens=max_tokens,
        min_tokens=fields.integer("min_tokens", 0, UINT32) or 0,
        stop=strings or [],
        stop_token_ids=[] if ids is None else whole_list("stop_token_ids", ids, 0, UINT32),
        ignore_eos=fields.boolean("ignore_eos"),
        include_stop_str_in_output=fields.boolean("include_stop_str_in_output"),
    )


def _cache_salt(fields: Fields) -> str:
    salt = fields.text("cache_salt")
    if salt == "":
        raise InvalidRequest("cache_salt", "empty; expected text, or nothing at all")
    return salt or ""
