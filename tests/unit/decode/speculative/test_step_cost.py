"""The cost model against known curves: what it learns, how fast, and what cannot mislead it."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import numpy as np
import pytest

from decode.speculative.step_cost import StepCost
from tests.support.drafting import CURVES, Curve


def learn(cost: StepCost, curve: Curve, sizes: list[int], num_steps: int, seed: int = 0) -> None:
    rng = random.Random(seed)
    for _ in range(num_steps):
        rows = rng.choice(sizes)
        cost.observe(rows, curve(rows) / 1000 * math.exp(rng.gauss(0, 0.05)))


def ratio(cost: StepCost, few: int, many: int) -> float:
    relative = cost.relative(few, many - few)
    return float(relative[-1] / relative[0])


def test_rows_are_nearly_free_before_anything_is_known() -> None:
    relative = StepCost().relative(1, 16)
    assert len(relative) == 17
    assert 1.2 < relative[-1] / relative[0] < 1.6
    assert sorted(relative) == relative.tolist()


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("base", [1, 8, 64])
def test_learns_a_curve_within_a_hundred_steps(curve: str, base: int) -> None:
    cost = StepCost()
    sizes = [base, base, base + 1, base + 2, base + 4, base + 8, base + 16]
    learn(cost, CURVES[curve], sizes, 100)
    for rows in (base + 2, base + 4, base + 16):
        expected = CURVES[curve](rows) / CURVES[curve](base)
        # Sizes between two of the model's own share what is learned: a stair is a slope there.
        assert ratio(cost, base, rows) == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("curve", ["cpu", "fast cpu", "steep"])
def test_two_sizes_teach_all_sizes(curve: str) -> None:
    cost = StepCost()
    learn(cost, CURVES[curve], [1, 5], 40)
    expected = CURVES[curve](16) / CURVES[curve](1)
    assert ratio(cost, 1, 16) == pytest.approx(expected, rel=0.35)


def test_a_common_slowdown_changes_no_shape() -> None:
    """One size is seen while the machine is twice as slow; its estimate stays right."""
    cost = StepCost()
    learn(cost, CURVES["cpu"], [1, 2, 4, 8], 200)
    before = ratio(cost, 1, 4)
    learn(cost, lambda rows: 2 * CURVES["cpu"](rows), [1], 50)
    assert ratio(cost, 1, 4) == pytest.approx(before, rel=0.12)
    learn(cost, lambda rows: 2 * CURVES["cpu"](rows), [1, 4], 50)
    assert ratio(cost, 1, 4) == pytest.approx(before, rel=0.08)


def test_one_stopped_step_changes_little() -> None:
    """A process that is stopped for a minute comes back with a step of a minute."""
    cost = StepCost()
    learn(cost, CURVES["cpu"], [1, 2, 4, 8], 200)
    before = cost.relative(1, 8)
    cost.observe(4, 60.0)
    assert np.allclose(cost.relative(1, 8), before, rtol=0.12)


def test_the_shape_returns_to_the_prior() -> None:
    cost = StepCost()
    learn(cost, CURVES["steep"], [1, 2, 4, 8], 200)
    learned = ratio(cost, 1, 4)
    learn(cost, CURVES["steep"], [1], 500)
    assert ratio(cost, 1, 4) > 0.75 * learned  # not soon
    learn(cost, CURVES["steep"], [1], 10_000)
    assert ratio(cost, 1, 4) < 1.3


def test_more_rows_never_cost_less() -> None:
    cost = StepCost()
    for rows, seconds in ((1, 0.02), (2, 0.01), (4, 0.03), (16, 0.01)):
        cost.observe(rows, seconds)
    relative = cost.relative(1, 40)
    assert all(a <= b for a, b in pairwise(relative))


def test_any_size_and_any_time_are_taken() -> None:
    cost = StepCost()
    for rows, seconds in ((0, 1.0), (1, 0.0), (1, -1.0), (1, math.nan)):
        cost.observe(rows, seconds)  # nothing that could be a step
    assert ratio(cost, 1, 4) == ratio(StepCost(), 1, 4)
    for rows, seconds in ((1, 1e-9), (1, 1e9), (10**6, 3.0), (8192, 0.5)):
        cost.observe(rows, seconds)
    assert np.isfinite(cost.relative(1, 100)).all()
    assert np.isfinite(cost.relative(10**6, 4)).all()


def test_the_filter_stays_stable_over_many_steps() -> None:
    cost, rng = StepCost(), random.Random(4)
    for _ in range(30_000):
        rows = int(2 ** rng.uniform(0, 13))
        cost.observe(rows, 0.01 * rows**0.5 * math.exp(rng.gauss(0, 0.3)))
    eigenvalues = np.linalg.eigvalsh(cost._covariance)
    assert eigenvalues.min() > -1e-9
    assert ratio(cost, 16, 64) == pytest.approx(2.0, rel=0.3)
