"""Recorded answers: the oracle is loaded where a record differs or is missing, and it decides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.base.kv_layout import hash_salt
from engine.base.types import FinishReason, SamplingParams, StopParams
from engine.scheduling.request import EngineRequest
from tests.support.near_tie import Outcome, Tally, Verdict
from tests.support.recorded import RecordedAnswers

WORK = EngineRequest("w", (5, 6), hash_salt(digest="x"), SamplingParams(), StopParams(max_tokens=3))
ANSWER = [1, 2, 3]
LENGTH = FinishReason.LENGTH


class Oracle:
    """Answers every request alike; near-ties are not excused."""

    def answers(self, works: list[EngineRequest], group: int = 8) -> list[Any]:
        return [(ANSWER, LENGTH) for _ in works]

    def judge(self, work: EngineRequest, expected: list[int], got: list[int]) -> Verdict:
        equal = list(expected) == list(got)
        return Verdict(Outcome.EQUAL) if equal else Verdict(Outcome.DIFFERENT, 0, "different")


@pytest.fixture
def loads() -> list[str]:
    """One entry for each time the oracle is loaded."""
    return []


@pytest.fixture
def answers(tmp_path: Path, loads: list[str]) -> RecordedAnswers:
    def load() -> Any:
        loads.append("loaded")
        return Oracle()

    RecordedAnswers("set", lambda: Oracle(), tmp_path).record([WORK])  # type: ignore[arg-type]
    return RecordedAnswers("set", load, tmp_path, Tally())


def test_an_answer_as_recorded_needs_no_oracle(answers: RecordedAnswers, loads: list[str]) -> None:
    assert answers.judge(WORK, ANSWER, LENGTH).outcome is Outcome.EQUAL
    assert answers.judge(WORK, ANSWER[:2], None).ok, "cancelled after two tokens"
    assert not loads
    assert answers._tally.counts() == (2, 5, [])


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [([1, 2, 4], LENGTH), ([1, 2], LENGTH), (ANSWER, FinishReason.STOP), ([2], None)],
)
def test_an_answer_that_differs_is_judged_by_the_oracle(
    answers: RecordedAnswers, loads: list[str], tokens: list[int], reason: FinishReason | None
) -> None:
    assert not answers.judge(WORK, tokens, reason).ok
    assert loads == ["loaded"]


def test_a_stale_record_does_not_fail_a_right_answer(
    answers: RecordedAnswers, loads: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "set.json"
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: {"tokens": [9, 9, 9], "reason": "length"}}))
    assert answers.judge(WORK, ANSWER, LENGTH).ok
    assert loads == ["loaded"]


@pytest.mark.parametrize(
    "changed",
    [
        replace(WORK, prompt=(5, 7)),
        replace(WORK, sampling=SamplingParams(temperature=0.5, seed=1)),
        replace(WORK, stop=StopParams(max_tokens=2)),
    ],
)
def test_a_changed_request_has_no_record(
    answers: RecordedAnswers, loads: list[str], changed: EngineRequest
) -> None:
    assert answers.judge(changed, ANSWER, LENGTH).ok
    assert loads == ["loaded"]
