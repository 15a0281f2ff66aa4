"""The conformance run itself: on a slice that needs no network, and against scripted workers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.ecosystem.conformance import answers, offline, report
from tests.ecosystem.conformance.answers import Answer, Way
from tests.ecosystem.conformance.checking import NotChecked, fault, validator
from tests.ecosystem.conformance.offline import Grammar
from tests.ecosystem.conformance.sources import Case, choice, suite_cases
from tests.support.constrained_front import SCHEMA, TEXT, front

WAYS = (Way("greedy", 0.0), Way("sampled", 0.8, 1))
SLICE = Path(__file__).parent / "conformance" / "slice"


@pytest.fixture(scope="module")
def grammars() -> list[Grammar]:
    return offline.study(suite_cases(SLICE), num_walks=6, seed=3)


def test_what_a_grammar_takes_is_valid(grammars: list[Grammar]) -> None:
    for grammar in grammars:
        assert grammar.wrong == ()
        assert grammar.not_checked == ""
        assert [fits for valid, fits, _ in grammar.taken if not valid and fits] == [], grammar.name
    assert sum(g.num_drawn for g in grammars) > 50


def test_what_is_valid_and_not_taken_has_a_reason_that_is_known(grammars: list[Grammar]) -> None:
    assert Counter(why for g in grammars for _, _, why in g.taken if why) == {
        "members in another order than the schema's": 1,
        "1.0 where 1 is written": 1,
        "a format is held, not only noted": 1,
    }


def test_what_cannot_be_held_is_refused(grammars: list[Grammar]) -> None:
    assert {g.name.partition("refused: ")[2]: report.kind(g.refused) for g in grammars} == {
        "": "other: ",
        "unique items": "`uniqueItems`",
        "not": "`not`",
        "one of two that are not told apart": "`oneOf` whose branches are not told apart",
        "another document": "a document that is not at hand",
        "nothing is valid": "nothing is valid",
    }


def case(schema: object) -> Case:
    return Case("c", json.dumps(schema))


def test_a_text_is_checked_by_the_draft_of_its_schema_and_with_exact_numbers() -> None:
    tenths = validator(case({"multipleOf": 0.1, "$schema": "x:unknown"}))
    assert fault(tenths, "0.3") == ""
    assert "not a multiple" in fault(tenths, "0.35")
    assert "not JSON" in fault(tenths, "0.3.")
    old = {"$schema": "https://json-schema.org/draft-04/schema#", "exclusiveMinimum": True}
    assert fault(validator(case({**old, "minimum": 1})), "1") != ""
    with pytest.raises(NotChecked, match="own draft"):
        validator(case({"type": "integer", "minimum": "1"}))
    with pytest.raises(NotChecked, match="none of Python's"):
        fault(validator(case({"pattern": r"\p{L}"})), '"x"')
    dates = case({"format": "date"})
    assert fault(validator(dates), '"no"') == ""
    assert fault(validator(dates, formats=True), '"no"') != ""


def test_a_choice_is_the_same_for_a_seed() -> None:
    cases = [Case(str(i), "{}") for i in range(50)]
    assert choice(cases, 9, 1) == choice(cases, 9, 1) != choice(cases, 9, 2)
    assert len(choice(cases, 99, 1)) == 50


async def test_a_stack_is_asked_and_what_is_not_valid_is_found(checkpoint) -> None:
    """Workers that answer the same whatever the constraint."""
    schemas = {"fits": SCHEMA, "does not": {"type": "integer"}, "refused": {"not": {}}}
    cases = [Case(name, json.dumps(schema)) for name, schema in schemas.items()]
    async with front(checkpoint) as f:
        await f.worker(ends_by_itself=True)
        found = await answers.ask_all(f.coordinator.address, cases, WAYS, len(f.answer))
        cut = await answers.ask_all(f.coordinator.address, cases[:1], WAYS, len(f.answer) - 2)
    assert [(a.case, a.way, a.outcome) for a in found] == [
        ("fits", "greedy", "finished"),
        ("fits", "sampled", "finished"),
        ("does not", "greedy", "finished"),
        ("does not", "sampled", "finished"),
        ("refused", "greedy", "refused"),
        ("refused", "sampled", "refused"),
    ]
    assert [(a.text, a.fault) for a in found[:2]] == [(TEXT, "")] * 2
    assert all("is not of type" in a.fault for a in found[2:4])
    assert all("not" in a.reason for a in found[4:])
    assert [a.outcome for a in cut] == ["cut", "cut"]
    table = report.answers_table("some", found)
    assert "schemas asked: 3, served: 2 of 3 (66.7 %), with a finished answer: 2" in table
    assert "finished answers that are valid: 2 of 4 (50.0 %)" in table
    offline_ = [Grammar("fits", "", ()), Grammar("does not", "", ()), Grammar("refused", "x", ())]
    lines = list(report.problems(report.Results(offline_, found)))
    assert [line.partition(":")[0] for line in lines] == ["NOT VALID does not"] * 2


def test_a_way_leans_to_the_end(checkpoint) -> None:
    found, tokenizer, _ = checkpoint
    ways = answers.ways_of(found.folder, 5)
    assert [(w.name, w.seed, bool(w.bias)) for w in ways] == [
        ("greedy", 0, False),
        ("sampled", 5, False),
        ("closing", 5, True),
    ]
    assert ways[2].bias[tokenizer.encode("}")[0]] > 0 > ways[2].bias[tokenizer.encode("\n")[0]]
    assert tokenizer.encode("a")[0] not in ways[2].bias


def test_problems_are_told() -> None:
    grammars = [Grammar("a", "", ((False, True, ""),), wrong=("x: no",)), Grammar("b", "why", ())]
    asked = [Answer("a", "greedy", "failed", reason="lost"), Answer("b", "greedy", "finished", "1")]
    lines = list(report.problems(report.Results(grammars, asked)))
    assert [line.split()[0] for line in lines] == ["DRAWN", "TAKEN", "FAILED", "DIFFERS"]
    assert "not valid: 1" in report.offline_table("some", grammars)
