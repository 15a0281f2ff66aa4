from __future__ import annotations

import pytest
import torch

from engine.attention.batch import Row
from engine.runner.loader import random_model
from tests.support.paged import Bench, tiny_config

MODEL = random_model(tiny_config(), 0)


def test_no_rows_and_no_logits_give_an_empty_answer() -> None:
    bench = Bench(MODEL)
    assert bench.runner.run([]).shape == (0, 101)
    s = bench.sequence(range(10))
    out = bench.step((s, 10, 0))
    assert out.shape == (0, 101) and out.dtype == torch.float32


def test_kv_without_logits_is_the_kv_with_them() -> None:
    """The last layer's KV is written although nothing after it is computed."""
    pools = []
    for num_logits in (0, 10):
        bench = Bench(MODEL)
        bench.step((bench.sequence(range(10)), 10, num_logits))
        pools.append(bench.kv_cache.pool)
    assert torch.equal(pools[0].isnan(), pools[1].isnan())
    assert torch.equal(pools[0].nan_to_num(), pools[1].nan_to_num())
    assert pools[0].isnan().logical_not().sum() == 10 * 2 * 2 * 2 * 8


def test_a_bad_row_writes_nothing() -> None:
    bench = Bench(MODEL)
    with pytest.raises(ValueError, match="row 1"):
        bench.runner.run([Row([1, 2], 0, [0], 1), Row([1], 4, [1], 1)])
    assert bench.kv_cache.pool.isnan().all()


def test_rows_of_a_step_may_share_blocks() -> None:
    """A prefix computed once serves two requests, as after a prefix hit."""
    bench = Bench(MODEL)
    first = bench.sequence(range(8), room=4)
    bench.step((first, 8, 0))
    tails = [bench.sequence([5, 6]), bench.sequence([7, 8])]
    rows = [Row(t.token_ids, 8, [*first.block_ids[0][:2], *t.block_ids[0]], 2) for t in tails]
    got = bench.runner.run(rows)
    alone = Bench(MODEL)
    for i, t in enumerate(tails):
        s = alone.sequence([*range(8), *t.token_ids])
        expected = alone.step((s, 10, 2))
        torch.testing.assert_close(got[2 * i : 2 * i + 2], expected, rtol=1e-4, atol=1e-4)


def test_the_answer_is_no_part_of_autograd() -> None:
    bench = Bench(MODEL)
    out = bench.step((bench.sequence([1, 2, 3]), 3, 1))
    assert out.is_inference() and not out.requires_grad
