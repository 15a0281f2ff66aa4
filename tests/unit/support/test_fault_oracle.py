"""The oracle of the fault suite: recorded answers, and what follows where one differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults import oracle as module
from tests.faults.oracle import CASES, Case, Choice, Differs, Oracle

CASE, OTHER = CASES["short-0"], CASES["load-0"]


class Cluster:
    """Answers each request with its length; counts what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.changes: dict[str, list[int]] = {}

    async def answer(self, address: str, cases: list[Case]) -> dict[str, list[Choice]]:
        self.asked += [case.name for case in cases]
        return {
            case.name: [Choice(self.changes.get(case.name, [len(case.prompt)]), "text")]
            for case in cases
        }


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cluster:
    it: Any = Cluster()
    monkeypatch.setattr(module, "_ask_all", it.answer)
    monkeypatch.setattr(module, "_RECORDS", tmp_path / "answers" / "faults.json")
    monkeypatch.setattr(module, "NATIVE", True)
    return it  # type: ignore[no-any-return]


@pytest.fixture
def oracle(cluster: Cluster) -> Oracle:
    Oracle.ask("here").record()
    cluster.asked.clear()
    return Oracle.load("here")


def failure(oracle: Oracle, case: Case) -> AssertionError:
    """Of an answer that no record has."""
    wrong = oracle.difference(case, 0, [7])
    assert wrong
    return oracle.failure(case, wrong)


def test_a_recorded_answer_is_not_asked_again(cluster: Cluster, oracle: Oracle) -> None:
    assert not cluster.asked
    assert oracle.answer(CASE) == [len(CASE.prompt)] and oracle.text(CASE) == "text"
    assert oracle.confirm("here") == ""
    assert not cluster.asked


def test_a_request_without_a_record_is_asked(
    cluster: Cluster, oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = Case("more", (5, 6), 3)
    monkeypatch.setitem(CASES, "more", more)
    loaded = Oracle.load("here")
    assert cluster.asked == ["more"] and loaded.answer(more) == [2]
    assert type(failure(loaded, more)) is AssertionError, "this machine's answer: no second try"


def test_a_difference_from_a_right_record_stands(cluster: Cluster, oracle: Oracle) -> None:
    assert isinstance(failure(oracle, CASE), Differs)
    cluster.changes = {"load-0": [1]}
    with pytest.raises(AssertionError, match="gives the recorded answer"):
        oracle.confirm("here")


def test_records_of_another_machine_are_replaced(cluster: Cluster, oracle: Oracle) -> None:
    failure(oracle, CASE)
    cluster.changes = {"short-0": [7], "load-0": [1]}
    assert oracle.confirm("here").endswith("of another machine: short-0, load-0")
    assert oracle.difference(CASE, 0, [7]) == "" and oracle.difference(OTHER, 0, [1]) == ""
    oracle.difference(CASE, 0, [8])
    assert type(oracle.failure(CASE, "wrong")) is AssertionError
