"""Draft lengths by simulation: never much slower than no drafts, near the best fixed length or
beyond.
"""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.speculative.acceptance import Acceptance
from decode.speculative.draft_length import (
    LONGEST_STEP,
    MARGIN,
    SHARED_STEP,
    MeasuredDraftLength,
)
from decode.speculative.step_cost import StepCost
from engine.scheduling.speculation import FORCED, Draft
from tests.support.drafting import CURVES, Known, choose, fixed, measured, produced, seconds
from tests.support.paths import DATA

NO_DRAFT = Draft([], [])
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
    drafts = {0: sure(16)}
    assert choose(make(0.95, 0.01), drafts, 1, 1) == [16]
    assert choose(make(0.2, 0.5), drafts, 1, 1) == [0]
    middle = choose(make(0.8, 0.2), drafts, 1, 1)[0]
    assert 2 <= middle <= 4  # the best of (1 - 0.8 ** (k + 1)) / 0.2 / (1 + 0.2 k) is at 3


def test_rows_go_to_the_likeliest_tokens() -> None:
    hopeless = Draft([7] * 8, [1] * 8)
    lengths = choose(make(0.8, 0.05), {0: sure(8), 1: hopeless, 2: NO_DRAFT}, 3, 3)
    assert lengths[0] > 2
    assert lengths[1:] == [0, 0]
    assert choose(make(0.8, 0.05), {}, 0, 0) == []


def test_a_long_step_carries_longer_drafts() -> None:
    """Beside a prompt's chunk a step is long anyway."""
    controller = make(0.5, 0.2)
    assert choose(controller, {0: sure(16)}, 25, 1) > choose(controller, {0: sure(16)}, 1, 1)


def test_drafts_that_were_not_verified_teach_too() -> None:
    controller = make(0.2, 0.5)
    assert choose(controller, {0: sure(4)}, 1, 1) == [0]
    for _ in range(200):
        choose(controller, {0: sure(4)}, 1, 1)
        produced(controller, 0, [7])
    assert choose(controller, {0: sure(4)}, 1, 1) != [0]


def test_memory_is_freed() -> None:
    controller = make(0.8, 0.1)
    choose(controller, {0: sure(4), 1: sure(4)}, 2, 2)
    produced(controller, 0, [7, 7])
    produced(controller, 77, [1])
    for draft_id in (0, 1, 10**6):
        controller.finish(draft_id)
    assert not controller._row_of.any()
    assert not controller._acceptance._requests.any()


def test_no_step_is_much_longer_than_one_without_drafts() -> None:
    """Certain drafts, rows that cost a third of a step each: all sixteen would give the most."""
    controller = MeasuredDraftLength(Acceptance((0.99,)), StepCost())
    for num_rows in (1, 2, 3, 5, 9, 17) * 200:
        controller.stepped(num_rows, 0.003 * (1 + (num_rows - 1) / 3))
    draft = Draft(list(range(16)), [0] * 16)
    longest = max(choose(controller, {0: draft}, 1, 1)[0] for _ in range(20))
    assert 0.7 * LONGEST_STEP < 1 + longest / 3 < 1.1 * LONGEST_STEP


@pytest.mark.parametrize("others", [[], [sure(1)], [NO_DRAFT] * 3])
def test_a_certain_draft_slows_other_answers_little(others: list[Draft]) -> None:
    """Forced tokens give more tokens a second, but must not slow the other answers."""
    controller = make(0.99, 0.3)
    forced = Draft([7] * 16, [FORCED] * 16)
    drafts = dict(enumerate([forced, *others]))
    num_answers = len(drafts) + (not others)  # and one that a prompt's last chunk gives
    lengths = max(
        (choose(controller, drafts, num_answers, num_answers) for _ in range(20)), key=sum
    )
    longer = 1 + 0.3 * sum(lengths) / (1 + 0.3 * (num_answers - 1))
    least = min(lengths[1:], default=0)
    assert sum(lengths) > 0
    assert longer < 1.1 * SHARED_STEP * (1 + least)
    alone = max(choose(controller, {0: forced}, 1, 1)[0] for _ in range(20))
    assert alone > lengths[0]


def by_the_loop(
    chances: list[float], owners: list[int], seconds: list[float], num_answers: int
) -> int:
    """How many tokens pay, a token after the other."""
    expected, of_each = float(num_answers), dict[int, float]()
    best, best_rate = 0, MARGIN * expected / seconds[0]
    for k, (chance, i) in enumerate(zip(chances, owners, strict=True), 1):
        of_each[i] = of_each.get(i, 0.0) + chance
        longer = seconds[k] / seconds[0]
        if longer > LONGEST_STEP:
            break
        expected += chance
        least = min(of_each.values()) if len(of_each) == num_answers else 0.0
        short = longer <= SHARED_STEP * (1.0 + least) or num_answers == 1
        if short and expected / seconds[k] > best_rate:
            best, best_rate = k, expected / seconds[k]
    return best


def passes_by_the_loop(owners: list[int], of_rows: list[float]) -> list[float]:
    """Cost of drafting the first 0, 1, 2, ... tokens, a token after the other."""
    lengths, num_rows, out = dict.fromkeys(owners, 0), [0] * (len(owners) + 1), [0.0]
    for i in owners:
        now = num_rows[lengths[i]]
        out.append(out[-1] + of_rows[now + 1] - of_rows[now])
        num_rows[lengths[i]] += 1
        lengths[i] += 1
    return out


@given(
    st.lists(st.lists(st.floats(0.02, 1.0), max_size=6), min_size=1, max_size=5),
    st.integers(0, 2),
    st.floats(0.0, 0.6),
    st.booleans(),
)
def test_the_best_number_of_tokens_is_that_of_a_loop(
    drafts: list[list[float]], num_more: int, row_cost: float, with_passes: bool
) -> None:
    """Chances fall along a draft; some answers have none."""
    tokens = [(p, i) for i, draft in enumerate(drafts) for p in sorted(draft, reverse=True)]
    tokens.sort(key=lambda token: -token[0])
    chances, owners = [p for p, _ in tokens], [i for _, i in tokens]
    num_answers = len(drafts) + num_more
    controller = make(0.5, row_cost)
    passes = StepCost()
    if with_passes:
        controller._drafting = passes
        for rows in (1, 2, 4, 8) * 20:
            passes.observe(rows, 0.002 * (1 + 0.3 * (rows - 1)))
    seconds = controller._cost.relative(num_answers, len(tokens))
    if tokens and with_passes:
        unit = passes.unit_s / controller._cost.unit_s
        of_rows = [0.0, *passes.relative(1, len(drafts)).tolist()]
        costs = [unit * x for x in passes_by_the_loop(owners, of_rows)]
        assert controller._passes(passes, np.array(owners)) == pytest.approx(costs)
        seconds = seconds + controller._passes(passes, np.array(owners))
    expected = by_the_loop(chances, owners, seconds.tolist(), num_answers)
    got = controller._best(np.array(chances), np.array(owners), num_answers, num_answers)
    assert got == expected
