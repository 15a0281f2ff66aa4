"""What an answer to an input of the fuzz must look like, whatever the input was.

malformed bytes      INVALID_ARGUMENT, BadRequest{request}
a refusal            a documented status; where it names a field, the request's type has it
an answer            well formed: one Finished, at the end; tokens, stops and usage agree
the caller went      CANCELLED or DEADLINE_EXCEEDED are as good
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from engine.pb.diptych.v1 import inference_pb2
from engine.rpc.status import DETAILS_KEY, PUSHBACK_KEY
from tests.support.fuzz_constraints import PLAIN_REGEXES
from tests.support.fuzz_messages import BESIDE, Input
from tests.support.fuzz_values import VOCAB_SIZE

Code = grpc.StatusCode
# What a stack that is well and not overloaded may say (docs/reliability.md, "Fuzz").
DOCUMENTED = frozenset(
    (Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED, Code.RESOURCE_EXHAUSTED)
)
GUARDED = frozenset((Code.UNAUTHENTICATED, Code.PERMISSION_DENIED))  # DrainWorker, where it asks
GONE = frozenset((Code.CANCELLED, Code.DEADLINE_EXCEEDED))
# The library's own status (INTERNAL) of a stream of requests that expired before its first write.
_GONE_BEFORE_IT_WROTE = "Internal error from Core"
_DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended."""

    code: grpc.StatusCode
    details: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    messages: Sequence[Message] = ()
    given_up: bool = False  # the caller cancelled, or gave it too little time


@dataclass(frozen=True, slots=True)
class Model:
    """What bounds an answer."""

    max_model_len: int
    eos_token_ids: frozenset[int]
    holds_constraints: bool = False  # a worker that answers anything does not


def complaint(case: Input, outcome: Outcome, model: Model) -> str | None:
    """What is wrong with an outcome; None: nothing."""
    try:
        _check(case, outcome, model)
    except AssertionError as error:
        return str(error) or "a check without words failed"
    return None


def _check(case: Input, outcome: Outcome, model: Model) -> None:
    code = outcome.code
    if outcome.given_up and (code in GONE or outcome.details == _GONE_BEFORE_IT_WROTE):
        return
    allowed = DOCUMENTED | GUARDED if case.method == "DrainWorker" else DOCUMENTED
    assert code in allowed, f"{code.name} is not documented: {outcome.details}"
    if code in GUARDED:
        return
    request = case.parse()
    if request is None:
        assert code is Code.INVALID_ARGUMENT, f"malformed bytes gave {code.name}"
        assert _field_of(outcome) == "request", f"malformed bytes blamed on {_field_of(outcome)!r}"
    elif code in (Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED):
        named = _field_of(outcome)
        if case.method in BESIDE:  # in the words of another protocol
            return
        first = named.partition(" ")[0]  # "n above 1"
        assert _has(request.DESCRIPTOR, first), f"no field {named!r}: {outcome.details}"
    elif code is Code.RESOURCE_EXHAUSTED:
        assert _detail(outcome, error_details_pb2.RetryInfo) is not None, "no RetryInfo"
        assert int(outcome.metadata[PUSHBACK_KEY]) > 0
    elif code is Code.OK:
        _check_answer(case, request, outcome.messages, model)


def _field_of(outcome: Outcome) -> str:
    bad = _detail(outcome, error_details_pb2.BadRequest)
    assert bad is not None, f"{outcome.code.name} without BadRequest: {outcome.details}"
    (violation,) = bad.field_violations
    assert violation.description
    return str(violation.field)


def _detail(outcome: Outcome, kind: Any) -> Any:
    raw = outcome.metadata.get(DETAILS_KEY)
    assert isinstance(raw, bytes), f"{outcome.code.name} without details: {outcome.details}"
    for packed in status_pb2.Status.FromString(raw).details:
        message = kind()
        if packed.Unpack(message):
            return message
    return None


def _has(descriptor: Any, path: str) -> bool:
    """Whether `path` ("stop.stop[3]", or a oneof's name) names something of this message."""
    current: Any = descriptor
    for part in path.split("."):
        name = part.partition("[")[0]
        if current is None:
            return False
        if name in current.oneofs_by_name:
            return True
        if name not in current.fields_by_name:
            return False
        if name.endswith("_json"):  # what follows is a place in that text
            return True
        current = current.fields_by_name[name].message_type
    return True


def _check_answer(case: Input, request: Any, messages: Sequence[Any], model: Model) -> None:
    if case.method in BESIDE:
        assert messages or case.descriptor.client_streaming, "an answer without messages"
        return
    if case.method in ("Generate", "Chat"):
        _check_stream(request, messages, model, chat=case.method == "Chat")
        return
    (answer,) = messages
    match case.method:
        case "Tokenize":
            assert all(0 <= token < VOCAB_SIZE for token in answer.token_ids)
            assert answer.max_model_len == model.max_model_len
        case "GetModel":
            assert answer.name
            assert answer.vocab_size == VOCAB_SIZE
        case "ListModels":
            assert len(answer.models) == 1
        case "ListWorkers":
            assert answer.workers


def _check_stream(request: Any, messages: Sequence[Any], model: Model, *, chat: bool) -> None:
    for message in messages:
        if message.WhichOneof("event") == "alive":
            assert request.alive, "a sign of life that was not asked for"
            assert message.request_id == request.request_id
    messages = [message for message in messages if message.WhichOneof("event") != "alive"]
    assert messages, "an answer without messages"
    kinds = [message.WhichOneof("event") for message in messages]
    assert None not in kinds, "a message without an event"
    (request_id,) = {message.request_id for message in messages}
    assert request_id == (request.request_id or request_id)
    assert request_id
    if kinds[0] == "prompt":
        _check_prompt(request, messages[0])
    assert kinds.count("prompt") == (kinds[0] == "prompt"), "a prompt in the middle"
    count = request.n if request.HasField("n") else 1
    assert {m.index for m in messages} <= set(range(count)), "an index that was not asked for"
    num_prompts = set()
    for index in range(count):
        own = [m for m in messages if m.index == index and m.WhichOneof("event") != "prompt"]
        events = [message.WhichOneof("event") for message in own]
        assert events, f"no message of choice {index}"
        assert events[-1] == "finished", f"the last message is {events[-1]}"
        assert events.count("finished") == 1, f"{events.count('finished')} ends"
        num_prompts.add(own[-1].finished.usage.prompt_tokens)
        _check_choice(request, own, index, model, default=0 if chat else _DEFAULT_MAX_TOKENS)
    assert len(num_prompts) == 1, "choices of different prompts"
    (num_prompt,) = num_prompts
    assert 0 < num_prompt < model.max_model_len
    if not chat and request.WhichOneof("prompt") == "token_ids":
        assert num_prompt == len(request.token_ids.ids)
    for message in messages:
        if message.WhichOneof("event") == "finished":
            length = num_prompt + message.finished.usage.completion_tokens
            assert length <= model.max_model_len, f"{length} tokens with the prompt"


def _check_prompt(request: Any, message: Any) -> None:
    output, prompt = request.output, message.prompt
    assert message.index == 0
    assert output.echo or output.HasField("prompt_logprobs"), "a prompt that was not asked for"
    assert all(token < VOCAB_SIZE for token in prompt.token_ids)
    told = len(prompt.token_ids) - 1 if output.HasField("prompt_logprobs") else 0
    assert len(prompt.logprobs) == told, f"{len(prompt.logprobs)} scores of {told} tokens"


def _check_choice(
    request: Any, messages: Sequence[Any], index: int, model: Model, default: int
) -> None:
    deltas, finished = [m.delta for m in messages[:-1]], messages[-1].finished
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert all(token < VOCAB_SIZE for token in tokens), "a token outside the vocabulary"
    for delta in deltas:
        told = len(delta.token_ids) if request.output.HasField("logprobs") else 0
        assert len(delta.logprobs) == told, f"{len(delta.logprobs)} scores of {told} tokens"
    resumed = [r for r in request.resume if r.index == index]
    num_resumed = sum(len(r.token_ids) for r in resumed)
    completion = finished.usage.completion_tokens
    assert 0 <= completion - len(tokens) <= num_resumed, f"{completion}, {len(tokens)} of them new"
    most = request.stop.max_tokens if request.stop.HasField("max_tokens") else default
    if most or request.stop.HasField("max_tokens"):
        assert completion <= most, f"{completion} tokens; at most {most}"
    assert finished.usage.cached_tokens <= finished.usage.prompt_tokens
    assert finished.usage.accepted_tokens <= finished.usage.draft_tokens
    _check_ending(request, tokens, finished, model, had_the_end=any(r.finished for r in resumed))
    text = "".join(delta.text for delta in deltas)
    _check_text(request, text)
    if model.holds_constraints and not resumed and not getattr(request, "tools_json", ""):
        _check_constraint(request, text, finished, model)
    for name in ("queue", "prefill", "kv_transfer", "first_token", "decode"):
        value = getattr(finished.timing, name)
        assert 0 <= value < math.inf, f"timing.{name} is {value}"


def _check_ending(
    request: Any, tokens: Sequence[int], finished: Any, model: Model, *, had_the_end: bool
) -> None:
    reasons = (inference_pb2.FINISH_REASON_STOP, inference_pb2.FINISH_REASON_LENGTH)
    assert finished.finish_reason in reasons, f"finish reason {finished.finish_reason}"
    matched = finished.matched_stop.WhichOneof("kind")
    if finished.finish_reason == inference_pb2.FINISH_REASON_LENGTH:
        assert matched is None
    elif not had_the_end and not _is_constrained(request):
        assert matched is not None, "stopped by nothing"
    if matched == "text":
        assert finished.matched_stop.text in request.stop.stop
    if matched == "token_id":
        known = set(request.stop.stop_token_ids)
        known |= set() if request.stop.ignore_eos else model.eos_token_ids
        assert finished.matched_stop.token_id in known
        assert not tokens or tokens[-1] == finished.matched_stop.token_id


def _check_text(request: Any, text: str) -> None:
    stop = request.stop
    if stop.include_stop_str_in_output or stop.min_tokens or request.resume:
        return  # it may stand in the text, or may have begun before it
    for unwanted in stop.stop:
        assert unwanted not in text, f"the stop string {unwanted!r} is in the text"


def _is_constrained(request: Any) -> bool:
    """Whether an answer may end without a stop: its grammar is complete."""
    kind = request.constraint.WhichOneof("kind")
    return kind is not None or bool(getattr(request, "tools_json", ""))


def _check_constraint(request: Any, text: str, finished: Any, model: Model) -> None:
    """A whole answer is what was asked for; one that was cut off need not be."""
    cut = finished.matched_stop.WhichOneof("kind") == "text" or (
        finished.matched_stop.HasField("token_id")
        and finished.matched_stop.token_id not in model.eos_token_ids
    )
    if (
        finished.finish_reason != inference_pb2.FINISH_REASON_STOP
        or cut
        or request.stop.include_stop_str_in_output
    ):
        return
    asked = request.constraint
    match asked.WhichOneof("kind"):
        case "choice":
            assert text in asked.choice.choices, f"{text!r} is none of the choices"
        case "json_schema":
            _json_of(text)
        case "json_object" if asked.json_object:
            assert isinstance(_json_of(text), dict), f"{text!r} is no JSON object"
        case "regex" if asked.regex in PLAIN_REGEXES:
            assert re.fullmatch(asked.regex, text), f"{text!r} does not match {asked.regex!r}"


def _json_of(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise AssertionError(f"{text!r} is not JSON: {error}") from None
