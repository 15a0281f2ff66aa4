"""A running stack is asked for an answer under each schema."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import tokenizers
from google.rpc import error_details_pb2, status_pb2

from engine.pb.diptych.v1 import inference_pb2, inference_pb2_grpc
from engine.rpc.channel import open_channel
from engine.rpc.status import DETAILS_KEY
from tests.ecosystem.conformance.checking import NotChecked, fault, validator
from tests.ecosystem.conformance.sources import Case

MAX_TOKENS = {"suite": 200, "schemastore": 300}
_IN_FLIGHT = 8
_TIMEOUT_S = 300.0
_SHOWN = 600  # characters of a schema in its prompt
_FINISH = inference_pb2.FinishReason


@dataclass(frozen=True)
class Way:
    """How to draw tokens."""

    name: str
    temperature: float
    seed: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What came of one request."""

    case: str
    way: str
    outcome: str  # finished, cut, refused or failed
    text: str = ""
    reason: str = ""  # of a refusal, of a failure
    fault: str = ""  # of a finished answer, by jsonschema
    not_checked: str = ""  # why jsonschema could not look
    format_fault: str = ""  # with its format checkers


def ways_of(folder: Path, seed: int) -> tuple[Way, ...]:
    """Greedy, sampled, and sampled with a leaning to close strings, lists and objects: a small
    model goes on for long.
    """
    vocabulary = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    closing = {token: 4.0 for text, token in vocabulary.items() if set(text) <= set('"}]')}
    space = {token: -6.0 for text, token in vocabulary.items() if set(text) <= set("ĠĊĉ")}
    return (
        Way("greedy", 0.0),
        Way("sampled", 0.8, seed),
        Way("closing", 0.8, seed, {**closing, **space}),
    )


async def ask_all(
    address: str, cases: Sequence[Case], ways: Sequence[Way], max_tokens: int
) -> list[Answer]:
    """Each case in each way, several in flight; in the order of the cases."""
    turn = asyncio.Semaphore(_IN_FLIGHT)
    channel = open_channel(address)
    stub = inference_pb2_grpc.InferenceServiceStub(channel)
    try:
        asked = [_ask(stub, turn, case, way, max_tokens) for case in cases for way in ways]
        return list(await asyncio.gather(*asked))
    finally:
        await channel.close()


async def _ask(stub: Any, turn: asyncio.Semaphore, case: Case, way: Way, max_tokens: int) -> Answer:
    text, finished = "", None
    async with turn:
        try:
            async for response in stub.Chat(_request(case, way, max_tokens), timeout=_TIMEOUT_S):
                if response.HasField("finished"):
                    finished = response.finished.finish_reason
                else:
                    text += response.delta.text
        except grpc.aio.AioRpcError as error:
            reason = _reason(error)
            refused = error.code() is grpc.StatusCode.INVALID_ARGUMENT and not text
            if refused and reason:
                return Answer(case.name, way.name, "refused", reason=reason)
            reason = f"{error.code().name}: {error.details()}"
            return Answer(case.name, way.name, "failed", text, reason)
    if finished != _FINISH.FINISH_REASON_STOP:
        return Answer(case.name, way.name, "cut", text)
    return _checked(case, way, text)


def _request(case: Case, way: Way, max_tokens: int) -> inference_pb2.ChatRequest:
    asked = f"Write a short JSON value for this JSON Schema:\n{case.source[:_SHOWN]}"
    return inference_pb2.ChatRequest(
        messages=[inference_pb2.Message(role="user", content=asked)],
        sampling=inference_pb2.Sampling(
            temperature=way.temperature, seed=way.seed, logit_bias=way.bias
        ),
        stop=inference_pb2.Stop(max_tokens=max_tokens),
        constraint=inference_pb2.Constraint(json_schema=case.source),
    )


def _reason(error: grpc.aio.AioRpcError) -> str:
    """What is wrong with the constraint; "": the refusal is of something else."""
    metadata = dict(error.trailing_metadata() or ())
    for detail in status_pb2.Status.FromString(metadata.get(DETAILS_KEY, b"")).details:
        request = error_details_pb2.BadRequest()
        if detail.Unpack(request):
            for violation in request.field_violations:
                if violation.field.startswith("constraint"):
                    return violation.description
    return ""


def _checked(case: Case, way: Way, text: str) -> Answer:
    try:
        found = fault(validator(case), text)
        strict = found or fault(validator(case, formats=True), text)
    except NotChecked as error:
        return Answer(case.name, way.name, "finished", text, not_checked=str(error))
    return Answer(case.name, way.name, "finished", text, fault=found, format_fault=strict)
