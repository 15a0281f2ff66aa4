"""The fuzz of the public API in its short form, and tests of the fuzz itself: it must be able to
see what it is there for. `make fuzz INPUTS=100000 SEED=n` is the long form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.text.served_model import Limits
from engine.base.errors import DiptychError, InvalidRequest
from engine.pb.diptych.v1 import inference_pb2 as pb
from engine.rpc.status import to_status
from tests.faults.fuzz import MAX_MODEL_LEN, Report, fuzz_in_process, fuzz_over_the_wire
from tests.support.fuzz_checks import Model, Outcome, complaint
from tests.support.fuzz_constraints import PLAIN_REGEXES
from tests.support.fuzz_messages import METHODS, Input, draw_input, make_input
from tests.support.fuzz_values import MODEL, VOCAB_SIZE
from tests.support.stack import Stack
from tests.support.validated import validated
from tests.support.vitals import MIB

SEED = 7
SEED_IN_PROCESS = 13  # ten of its inputs have a part that is not served
IN_PROCESS, BESIDE_IN_PROCESS, OVER_THE_WIRE = 2_500, 1_000, 250
LIMITS = Limits(MODEL, VOCAB_SIZE, (2,), MAX_MODEL_LEN)


def clean(report: Report) -> None:
    """Nothing wrong, and the run was worth something."""
    print(report)
    assert not report.complaints, "\n".join(report.complaints[:10])
    assert not report.leaks, "\n".join(report.leaks[:10])
    assert report.num_malformed > report.num_inputs // 20
    assert report.num_answers > report.num_inputs // 10
    assert {method for method, status in report.by_method if status == "OK"} >= {
        *METHODS.keys() - {"DrainWorker"}
    }
    seen = {status for _, status in report.by_method}
    assert seen >= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}
    if report.num_inputs >= IN_PROCESS:  # few fields are left that are not served
        assert "UNIMPLEMENTED" in seen


@pytest.mark.timeout(180)
def test_in_process() -> None:
    report = fuzz_in_process(SEED_IN_PROCESS, range(IN_PROCESS))
    clean(report)
    assert report.growth_bytes < 64 * MIB


@pytest.mark.timeout(180)
def test_the_protocols_beside_in_process() -> None:
    report = fuzz_in_process(SEED, range(BESIDE_IN_PROCESS), beside=True)
    print(report)
    assert not report.complaints, "\n".join(report.complaints[:10])
    assert not report.leaks, "\n".join(report.leaks[:10])
    for method in ("ModelInfer", "ModelStreamInfer"):
        assert report.by_method[f"GRPCInferenceService.{method}", "OK"] > BESIDE_IN_PROCESS // 50
    assert report.by_method["VllmEngine.Generate", "OK"] > BESIDE_IN_PROCESS // 50


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with Stack(tmp_path, "--max-model-len", str(MAX_MODEL_LEN)) as running:
        yield running


@pytest.mark.timeout(300)
def test_over_the_wire(stack: Stack) -> None:
    clean(fuzz_over_the_wire(SEED, range(OVER_THE_WIRE), stack))


def test_an_input_is_a_function_of_seed_and_index() -> None:
    assert make_input(3, 14) == make_input(3, 14)
    assert len({make_input(3, i).raw for i in range(200)}) > 150
    assert make_input(4, 14) != make_input(3, 14)


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_door_says_ok_or_names_a_field(random: Random) -> None:
    """Below the wire, where hypothesis can shrink what breaks it."""
    case = draw_input(random)
    request = case.parse()
    if request is None or case.method not in ("Generate", "Chat"):
        return
    try:
        checked = validated(request, LIMITS)
    except DiptychError as error:
        status = to_status(error)
        found = Outcome(status.code, status.message, dict(status.trailing_metadata))
        assert complaint(case, found, Model(MAX_MODEL_LEN, frozenset())) is None
    else:
        assert checked.request_id
        assert all(token < VOCAB_SIZE for token in checked.stop_token_ids)


def answer(**changes: int) -> list[pb.GenerateResponse]:
    """A well-formed answer of two tokens to `ASKED`, with parts of it changed."""
    usage = pb.Usage(prompt_tokens=1, completion_tokens=changes.get("completion_tokens", 2))
    finished = pb.Finished(finish_reason=changes.get("finish_reason", 2), usage=usage)
    token = changes.get("token", 5)
    return [
        pb.GenerateResponse(request_id="r", delta=pb.Delta(text="a", token_ids=[token, 6])),
        *[pb.GenerateResponse(request_id="r", finished=finished)] * changes.get("num_finished", 1),
    ]


ASKED = Input(
    0,
    "Generate",
    "sensible",
    pb.GenerateRequest(
        request_id="r", token_ids=pb.TokenIds(ids=[1]), stop=pb.Stop(max_tokens=2)
    ).SerializeToString(),
)
MODEL_LIMITS = Model(MAX_MODEL_LEN, frozenset((2,)))


def status_of(error: DiptychError) -> Outcome:
    status = to_status(error)
    return Outcome(status.code, status.message, dict(status.trailing_metadata))


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (Outcome(grpc.StatusCode.OK, messages=answer()), None),
        (Outcome(grpc.StatusCode.OK, messages=answer(num_finished=2)), "2 ends"),
        (Outcome(grpc.StatusCode.OK, messages=answer(num_finished=0)), "the last message"),
        (Outcome(grpc.StatusCode.OK, messages=answer(token=VOCAB_SIZE)), "outside the vocabulary"),
        (Outcome(grpc.StatusCode.OK, messages=answer(completion_tokens=3)), "of them new"),
        (Outcome(grpc.StatusCode.OK, messages=answer(finish_reason=1)), "stopped by nothing"),
        (Outcome(grpc.StatusCode.OK), "without messages"),
        (Outcome(grpc.StatusCode.UNKNOWN), "not documented"),
        (Outcome(grpc.StatusCode.INTERNAL), "not documented"),
        (Outcome(grpc.StatusCode.DEADLINE_EXCEEDED), "not documented"),
        (Outcome(grpc.StatusCode.DEADLINE_EXCEEDED, given_up=True), None),
        (Outcome(grpc.StatusCode.INVALID_ARGUMENT), "without details"),
        (status_of(InvalidRequest("sampling.top_q", "?")), "no field"),
        (status_of(InvalidRequest("sampling.logit_bias[7]", "?")), None),
        (status_of(InvalidRequest("prompt", "?")), None),
    ],
)
def test_the_fuzz_sees_what_is_wrong(outcome: Outcome, words: str | None) -> None:
    found = complaint(ASKED, outcome, MODEL_LIMITS)
    assert (found is None) == (words is None), found
    assert (words or "") in (found or "")


OBJECT = {"type": "object"}


@pytest.mark.parametrize(
    ("asked", "text", "words"),
    [
        (pb.Constraint(regex=PLAIN_REGEXES[1]), "maybe", None),
        (pb.Constraint(regex=PLAIN_REGEXES[1]), "mayb", "does not match"),
        (pb.Constraint(json_schema=json.dumps(OBJECT)), "{}", None),
        (pb.Constraint(json_schema=json.dumps(OBJECT)), '{"a"', "is not JSON"),
        (pb.Constraint(json_object=True), "[]", "no JSON object"),
        (pb.Constraint(choice=pb.Choices(choices=["a", "b"])), "b", None),
        (pb.Constraint(choice=pb.Choices(choices=["a", "b"])), "ab", "none of the choices"),
    ],
)
def test_the_fuzz_sees_an_answer_that_breaks_its_constraint(
    asked: pb.Constraint, text: str, words: str | None
) -> None:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1]), stop=pb.Stop(max_tokens=9), constraint=asked
    )
    case = Input(0, "Generate", "sensible", request.SerializeToString())
    usage = pb.Usage(prompt_tokens=1, completion_tokens=1)
    for reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH):
        messages = [
            pb.GenerateResponse(request_id="r", delta=pb.Delta(text=text, token_ids=[5])),
            pb.GenerateResponse(
                request_id="r", finished=pb.Finished(finish_reason=reason, usage=usage)
            ),
        ]
        whole = words if reason == pb.FINISH_REASON_STOP else None  # cut off, it need not be whole
        model = Model(MAX_MODEL_LEN, frozenset((2,)), holds_constraints=True)
        found = complaint(case, Outcome(grpc.StatusCode.OK, messages=messages), model)
        assert (found is None) == (whole is None), found
        assert (whole or "") in (found or "")


def test_malformed_bytes_must_be_the_callers_fault() -> None:
    broken = Input(0, "Generate", "random", b"\xff\xff")
    assert complaint(broken, Outcome(grpc.StatusCode.OK, messages=answer()), MODEL_LIMITS)
    assert complaint(broken, status_of(InvalidRequest("stop", "?")), MODEL_LIMITS)
    assert complaint(broken, status_of(InvalidRequest("request", "?")), MODEL_LIMITS) is None
