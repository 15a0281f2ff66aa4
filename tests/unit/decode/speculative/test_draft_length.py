"""Draft lengths by simulation: never much slower than no drafts, near the best fixed length or
beyond.
"""

from __future__ import annotations

import json
import random

import pytest

from decode.speculative.acceptance import Acceptance
from decode.speculative.draft_length import LONGEST_STEP, SHARED_STEP, MeasuredDraftLength
from decode.speculative.step_cost import StepCost
from engine.scheduling.speculation import FORCED, NO_DRAFT, Draft
from tests.support.drafting import CURVES, Known, fixed, measured, seconds
from tests.support.paths import DATA

ORACLE = json.loads((DATA / "greedy_fp32.json").read_text())


def new_text(count: int = 24) -> list[Known]:
    """Tokens that never repeat: no match to draft from."""
    rng = random.Random(1)
    tokens = list(range(count * 300))
    rng.shuffle(tokens)
    parts = [tokens[i * 300 : (i + 1) * 300] for i in range(count)]
    return [Known(part[:150], part[150:]) for part in parts]


def misleading_text(count: int = 24) -> list[Known]:
    """Noise over six tokens: always something to draft from, never more than luck."""
    rng = random.Random(2)
    parts = [[rng.randrange(6) for _ in range(300)] for _ in range(count)]
    return [Known(part[:150], part[150:]) for part in parts]


def repeated_text(count: int = 24) -> list[Known]:
    """300 tokens of text given twice and begun a third time."""
    long = [t for item in ORACLE for t in item["prompt"]]
    parts = [long[i * 300 : (i + 1) * 300] for i in range(count)]
    return [Known([*part, *part, *part[:20]], part[20:276]) for part in parts]


def real_answers() -> list[Known]:
    return [Known(item["prompt"], item["tokens"]) for item in ORACLE]


def speed(answers: list[Known], curve: str, num_seqs: int, *, disturbed: bool = False) -> float:
    """Relative to no drafts."""
    plain_s = seconds(answers, CURVES[curve], num_seqs, fixed(0))
    return plain_s / seconds(answers, CURVES[curve], num_seqs, measured(), disturbed=disturbed)


def best_fixed(answers: list[Known], curve: str, num_seqs: int) -> float:
    plain_s = seconds(answers, CURVES[curve], num_seqs, fixed(0))
    lengths = (1, 2, 4, 8, 16)
    return max(
        plain_s / seconds(answers, CURVES[curve], num_seqs, fixed(length)) for length in lengths
    )


@pytest.mark.parametrize("disturbed", [False, True])
@pytest.mark.parametrize("num_seqs", [1, 8])
@pytest.mark.parametrize("curve", CURVES)
def test_text_that_does_not_repeat_loses_at_most_3_percent(
    curve: str, num_seqs: int, disturbed: bool
) -> None:
    for text in (new_text(), misleading_text()):
        assert speed(text, curve, num_seqs, disturbed=disturbed) > 0.97


@pytest.mark.parametrize("num_seqs", [1, 4])
@pytest.mark.parametrize("curve", CURVES)
def test_text_that_repeats_is_as_fast_as_with_the_best_fixed_length(
    curve: str, num_seqs: int
) -> None:
    text = repeated_text()
    # The edge of a stair lies between two sizes that share what is learned.
    share = 0.8 if curve == "stairs" else 0.9
    assert speed(text, curve, num_seqs) > share * best_fixed(text, curve, num_seqs)


@pytest.mark.parametrize("num_seqs", [1, 8])
@pytest.mark.parametrize("curve", CURVES)
def test_recorded_answers_win_or_lose_little(curve: str, num_seqs: int) -> None:
    """24 answers are 200 steps at 8 at once: most of the loss is learning what rows cost."""
    got, best = speed(real_answers(), curve, num_seqs), best_fixed(real_answers(), curve, num_seqs)
    assert got > 0.96
    assert got > 0.9 * best


def test_drafting_resumes_where_it_begins_to_pay() -> None:
    """After long text without a hit, a copied text gets drafts within the answer."""
    text = [*misleading_text(48), *repeated_text()]
    speculation = measured()
    seconds(text[:48], CURVES["fast cpu"], 1, speculation)
    after_s = seconds(text[48:], CURVES["fast cpu"], 1, speculation)
    fresh_s = seconds(text[48:], CURVES["fast cpu"], 1, measured())
    assert after_s < 1.05 * fresh_s


def sure(count: int) -> Draft:
    return Draft([7] * count, [0] * count)


def make(chance: float, row_cost: float) -> MeasuredDraftLength:
    """A controller that knows that a further row costs this share of a step of one row."""
    cost = StepCost()
    for _ in range(50):
        for rows in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32):
            cost.observe(rows, 0.01 * (1 + row_cost * (rows - 1)))
    return MeasuredDraftLength(Acceptance([chance, 0.01]), cost)


def test_lengths_follow_chances_and_costs() -> None:
    drafts = [("a", sure(16))]
    assert make(0.95, 0.01).choose(drafts, 1, 1) == [16]
    assert make(0.2, 0.5).choose(drafts, 1, 1) == [0]
    middle = make(0.8, 0.2).choose(drafts, 1, 1)[0]
    assert 2 <= middle <= 4  # the best of (1 - 0.8 ** (k + 1)) / 0.2 / (1 + 0.2 k) is at 3


def test_rows_go_to_the_likeliest_tokens() -> None:
    hopeless = Draft([7] * 8, [1] * 8)
    lengths = make(0.8, 0.05).choose([("a", sure(8)), ("b", hopeless), ("c", NO_DRAFT)], 3, 3)
    assert lengths[0] > 2
    assert lengths[1:] == [0, 0]
    assert make(0.8, 0.05).choose([], 0, 0) == []


def test_a_long_step_carries_longer_drafts() -> None:
    """Beside a prompt's chunk a step is long anyway."""
    controller = make(0.5, 0.2)
    assert controller.choose([("a", sure(16))], 25, 1) > controller.choose([("a", sure(16))], 1, 1)


def test_drafts_that_were_not_verified_teach_too() -> None:
    controller = make(0.2, 0.5)
    assert controller.choose([("a", sure(4))], 1, 1) == [0]
    for _ in range(200):
        controller.choose([("a", sure(4))], 1, 1)
        controller.produced("a", [7])
    assert controller.choose([("a", sure(4))], 1, 1) != [0]


def test_memory_is_freed() -> None:
    controller = make(0.8, 0.1)
    controller.choose([("a", sure(4)), ("b", sure(4))], 2, 2)
    controller.produced("a", [7, 7])
    controller.produced("unknown", [1])
    for request_id in ("a", "b", "never seen"):
        controller.finish(request_id)
    assert not controller._drafts
    assert not controller._acceptance._requests


def test_no_step_is_much_longer_than_one_without_drafts() -> None:
    """Certain drafts, rows that cost a third of a step each: all sixteen would give the most."""
    controller = MeasuredDraftLength(Acceptance((0.99,)), StepCost())
    for num_rows in (1, 2, 3, 5, 9, 17) * 200:
        controller.stepped(num_rows, 0.003 * (1 + (num_rows - 1) / 3))
    draft = Draft(list(range(16)), [0] * 16)
    longest = max(controller.choose([("a", draft)], 1, 1)[0] for _ in range(20))
    assert 0.7 * LONGEST_STEP < 1 + longest / 3 < 1.1 * LONGEST_STEP


@pytest.mark.parametrize("others", [[], [sure(1)], [NO_DRAFT] * 3])
def test_a_certain_draft_slows_other_answers_little(others: list[Draft]) -> None:
    """Forced tokens give more tokens a second, but must not slow the other answers."""
    controller = make(0.99, 0.3)
    forced = Draft([7] * 16, [FORCED] * 16)
    drafts = [("forced", forced), *((str(i), draft) for i, draft in enumerate(others))]
    num_answers = len(drafts) + (not others)  # and one that a prompt's last chunk gives
    lengths = max((controller.choose(drafts, num_answers, num_answers) for _ in range(20)), key=sum)
    longer = 1 + 0.3 * sum(lengths) / (1 + 0.3 * (num_answers - 1))
    least = min(lengths[1:], default=0)
    assert sum(lengths) > 0
    assert longer < 1.1 * SHARED_STEP * (1 + least)
    alone = max(controller.choose([("forced", forced)], 1, 1)[0] for _ in range(20))
    assert alone > lengths[0]
