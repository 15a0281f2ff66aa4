"""The check of a public request: a GenerationRequest, or an error that names the field. Pure.

No later step checks a range again.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

from coordinator.api.validation.bounds import check_count
from coordinator.api.validation.constraint import constraint_from
from coordinator.api.validation.template_kwargs import check_template_kwargs
from coordinator.api.validation.tools import (
    check_enforced,
    check_tool_calls,
    check_tools,
    text_schema,
    tool_use,
)
from coordinator.api.values import GenerateRequest, Sampling, Stop
from coordinator.generation.request import DEFAULT_MAX_TOKENS, GenerationRequest, Resume
from coordinator.text import json_bounds as nesting
from coordinator.text.served_model import Limits
from coordinator.text.tools.grammar import tool_grammar
from coordinator.text.values import ASSISTANT, Message
from engine.base.errors import InvalidRequest, NotFound
from engine.base.seeds import default_seed
from engine.base.types import Constraint, SamplingParams

MAX_CHOICES = 64
MAX_LOGPROBS = 20
MAX_REQUEST_ID_CHARS = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_SALT_CHARS = 1024
MAX_AFFINITY_CHARS = 128
MAX_DETOKENIZED = 1_000_000
# Beyond these a float32 logit may overflow, and no token would be left.
MIN_REPETITION_PENALTY = 1e-3
MAX_REPETITION_PENALTY = 1e3


def check_model(name: str, limits: Limits) -> None:
    """Raise NotFound unless `name` is unset or the served model's."""
    if name and name != limits.model:
        raise NotFound(f"model: {name!r} is not served here; {limits.model!r} is")


def validate(request: GenerateRequest, limits: Limits) -> GenerationRequest:
    """Check a request. Raises InvalidRequest, NotFound, NotOffered."""
    check_model(request.model, limits)
    token_ids, messages, tools = None, None, None
    template_kwargs: dict[str, Any] = {}
    if request.messages is not None:
        messages = check_messages("messages", request.messages, limits)
        source = request.template_kwargs_json
        template_kwargs = check_template_kwargs("template_kwargs_json", source)
        found = check_tools("tools_json", request.tools_json)
        tools = tool_use(request, found, limits.tool_format)
    else:
        token_ids = _prompt_tokens(request, limits)
    calls = tools is not None and bool(tools.callable)
    if tools and calls:
        check_enforced("tools_json", tools)
        tools = replace(tools, text_schema=text_schema(request.constraint, tools))
        constraint: Constraint | None = tool_grammar(tools, tools.text_schema)
    else:
        constraint = constraint_from(request.constraint)
    stop, output = request.stop, request.output
    request_id, num_choices = request.request_id, request.n
    check_count("request_id", len(request_id), MAX_REQUEST_ID_CHARS, "characters")
    if not request_id.isprintable():
        raise InvalidRequest("request_id", "expected printable characters")
    if not 1 <= num_choices <= MAX_CHOICES:
        raise InvalidRequest("n", f"{num_choices}; expected 1 to {MAX_CHOICES}")
    num_prompt_logprobs = _num_logprobs("prompt_logprobs", output.prompt_logprobs)
    shows_prompt = output.echo or num_prompt_logprobs is not None
    max_tokens = _max_tokens(stop, at_least=0 if shows_prompt else 1)
    stop_ids = _stop_token_ids(stop, limits)
    if len(request.cache_salt) > MAX_SALT_CHARS:
        raise InvalidRequest("cache_salt", f"longer than {MAX_SALT_CHARS} characters")
    return GenerationRequest(
        request_id=request_id,
        text=request.text,
        token_ids=token_ids,
        messages=messages,
        sampling=_sampling(request.sampling, limits, request_id),
        max_tokens=max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS if messages is None else None,
        min_tokens=stop.min_tokens,
        stop_strings=_stop_strings(stop.stop),
        stop_token_ids=stop_ids & frozenset(limits.eos_token_ids) if calls else stop_ids,
        content_stop_ids=stop_ids - frozenset(limits.eos_token_ids) if calls else frozenset(),
        include_stop=stop.include_stop_str_in_output,
        skip_special_tokens=output.skip_special_tokens,
        priority=request.priority,
        cache_salt=request.cache_salt,
        tools=tools,
        reasoning=limits.reasoning if messages is not None else None,
        template_kwargs=template_kwargs,
        constraint=constraint,
        num_logprobs=_num_logprobs("logprobs", output.logprobs),
        num_prompt_logprobs=num_prompt_logprobs,
        echo=output.echo,
        num_choices=num_choices,
        resumes=_resumes(request.resume, num_choices, limits, max_tokens),
    )


def _prompt_tokens(request: GenerateRequest, limits: Limits) -> tuple[int, ...] | None:
    """The tokens of a raw prompt; None where it is a text."""
    if request.token_ids is None:
        if request.text is None:  # an empty one is a prompt where the tokenizer adds a token
            raise InvalidRequest("prompt", "unset; expected text or token_ids")
        return None
    field = "token_ids.ids"
    token_ids = check_token_ids(field, request.token_ids, limits, limits.max_model_len)
    if not token_ids:
        what = "empty; expected at least one token, such as the model's first"
        raise InvalidRequest(field, what)
    return token_ids


def check_messages(
    field: str, messages: Collection[Message], limits: Limits
) -> tuple[Message, ...]:
    """A conversation of at least one message, each with a role and a content.

    An assistant's message may have no content: it made calls, or its text was empty.
    """
    if len(messages) > limits.max_model_len:  # rendering a million of them takes long
        raise InvalidRequest(
            field, f"{len(messages)} messages do not fit a context of {limits.max_model_len} tokens"
        )
    checked = []
    items = nesting.Items()
    for i, message in enumerate(messages):
        if not message.role:
            raise InvalidRequest(f"{field}[{i}].role", "unset; expected system, user or assistant")
        silent = message.role == ASSISTANT or message.tool_calls
        if message.content is None and not silent:
            raise InvalidRequest(f"{field}[{i}].content", "unset; expected text")
        calls = check_tool_calls(f"{field}[{i}].tool_calls", message.tool_calls, items)
        checked.append(replace(message, tool_calls=calls))
    if not checked:
        raise InvalidRequest(field, "empty; expected at least one message")
    return tuple(checked)


def check_token_ids(
    field: str, ids: Sequence[int], limits: Limits, max_len: int
) -> tuple[int, ...]:
    """At most `max_len` ids within the vocabulary; an error names the first one that is not.

    The length is checked first: checks of millions of ids would block the event loop for seconds.
    """
    check_count(field, len(ids), max_len, "tokens")
    found = tuple(ids[:])  # twice as fast as iterating the field twice
    if found and max(found) >= limits.vocab_size:
        index = next(i for i, token in enumerate(found) if token >= limits.vocab_size)
        raise InvalidRequest(
            f"{field}[{index}]",
            f"{found[index]} is not a token; expected 0 to {limits.vocab_size - 1}",
        )
    return found


def _num_logprobs(name: str, count: int | None) -> int | None:
    if count is not None and count > MAX_LOGPROBS:
        raise InvalidRequest(f"output.{name}", f"{count}; expected at most {MAX_LOGPROBS}")
    return count


def _max_tokens(stop: Stop, at_least: int) -> int | None:
    if stop.max_tokens is None:
        return None
    if stop.max_tokens < at_least:
        raise InvalidRequest(
            "stop.max_tokens",
            f"{stop.max_tokens}; expected at least {at_least}, or 0 with output.echo or"
            " output.prompt_logprobs",
        )
    if stop.min_tokens > stop.max_tokens:
        raise InvalidRequest(
            "stop.min_tokens", f"{stop.min_tokens} is above max_tokens {stop.max_tokens}"
        )
    return stop.max_tokens


def _stop_token_ids(stop: Stop, limits: Limits) -> frozenset[int]:
    """The requested ids, and the end-of-sequence ids unless they are ignored."""
    field = "stop.stop_token_ids"
    found = set(check_token_ids(field, stop.stop_token_ids, limits, limits.vocab_size))
    if not stop.ignore_eos:
        found.update(limits.eos_token_ids)
    if stop.min_tokens and len(found) >= limits.vocab_size:
        raise InvalidRequest(field, "all tokens there are; none is left for the first min_tokens")
    return frozenset(found)


def _stop_strings(strings: Sequence[str]) -> tuple[str, ...]:
    check_count("stop.stop", len(strings), MAX_STOP_STRINGS, "strings")
    for i, text in enumerate(strings):
        if not text:
            raise InvalidRequest(f"stop.stop[{i}]", "empty; expected text")
        if len(text) > MAX_STOP_CHARS:
            raise InvalidRequest(f"stop.stop[{i}]", f"longer than {MAX_STOP_CHARS} characters")
    return tuple(strings)


def _rounded(numbers: Iterable[float]) -> list[float]:
    """Rounded to 32 bits, as the messages to workers round them."""
    return array("f", numbers).tolist()


def _sampling(sampling: Sampling, limits: Limits, request_id: str) -> SamplingParams:
    check_count("sampling.logit_bias", len(sampling.logit_bias), limits.vocab_size, "tokens")
    tokens = sorted(sampling.logit_bias)
    bias = tuple(zip(tokens, _rounded(map(sampling.logit_bias.__getitem__, tokens)), strict=True))
    for token, value in bias:
        if token < limits.vocab_size and -100 <= value <= 100:
            continue
        field = f"sampling.logit_bias[{token}]"
        if token >= limits.vocab_size:
            raise InvalidRequest(field, f"not a token; expected 0 to {limits.vocab_size - 1}")
        raise InvalidRequest(field, f"{value:g}; expected a number from -100 to 100")

    defaults = limits.sampling.values()

    def number(name: str, default: float, low: float, high: float, *, above: bool = False) -> float:
        """The field in [low, high], or (low, high] if `above`; NaN and infinity never are."""
        if getattr(sampling, name) is None:
            return _rounded([defaults.get(name, default)])[0]
        (value,) = _rounded([getattr(sampling, name)])
        if math.isfinite(value) and low <= value <= high and not (above and value == low):
            return value
        expected = "above" if above else "at least" if math.isinf(high) else "from"
        upto = "" if math.isinf(high) else f" to {high:g}"
        what = f"{value:g}; expected a number {expected} {low:g}{upto}"
        raise InvalidRequest(f"sampling.{name}", what)

    return SamplingParams(
        temperature=number("temperature", sampling.default_temperature, 0.0, math.inf),
        top_p=number("top_p", 1.0, 0.0, 1.0, above=True),
        top_k=limits.sampling.top_k or 0 if sampling.top_k is None else sampling.top_k,
        min_p=number("min_p", 0.0, 0.0, 1.0),
        frequency_penalty=number("frequency_penalty", 0.0, -2.0, 2.0),
        presence_penalty=number("presence_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=number(
            "repetition_penalty", 1.0, MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY
        ),
        seed=default_seed(request_id) if sampling.seed is None else sampling.seed,
        logit_bias=bias,
    )


def _resumes(
    entries: Sequence[Resume], num_choices: int, limits: Limits, max_tokens: int | None
) -> tuple[Resume, ...]:
    """The part of each choice that the client has; empty where it has nothing."""
    if not entries:
        return ()
    if len(entries) > num_choices:
        raise InvalidRequest("resume", f"{len(entries)} entries; expected one a choice")
    found: dict[int, Resume] = {}
    for i, entry in enumerate(entries):
        field = f"resume[{i}]"
        if entry.index >= num_choices:
            raise InvalidRequest(f"{field}.index", f"{entry.index}; expected below {num_choices}")
        if entry.index in found:
            raise InvalidRequest(f"{field}.index", f"{entry.index} stands there twice")
        field += ".token_ids"
        ids = check_token_ids(field, entry.token_ids, limits, limits.max_model_len)
        if max_tokens is not None and len(ids) > max_tokens:
            raise InvalidRequest(field, f"{len(ids)} tokens are more than max_tokens {max_tokens}")
        if len(entry.affinity_token) > MAX_AFFINITY_CHARS:
            raise InvalidRequest(
                f"resume[{i}].affinity_token", f"longer than {MAX_AFFINITY_CHARS} characters"
            )
        found[entry.index] = replace(entry, token_ids=ids)
    return tuple(found.get(index, Resume()) for index in range(num_choices))
