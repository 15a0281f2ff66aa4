from __future__ import annotations

import random

import pytest
import torch

from engine.attention.batch import Row
from engine.attention.torch_backend import CHUNK_QUERIES, TorchBackend, group_rows
from engine.cache.kv_cache import KVCache
from engine.models.config import AttentionSpec
from tests.support.backends import build_batch
from tests.unit.engine.attention.reference import (
    CASES,
    HEADS,
    poisoned,
    queries,
    reference_attention,
)

CPU = torch.device("cpu")


def attend(
    rows: list[Row], cache: KVCache, q: torch.Tensor, layer: int = 1, window: int = 0
) -> torch.Tensor:
    backend = TorchBackend(cache.layout, HEADS, AttentionSpec(window=window))
    plan = backend.plan(build_batch(rows, cache.layout.block_size, CPU))
    return backend.run(plan, layer, q, cache)


@pytest.mark.parametrize("window", [0, 1, 6, 37])
@pytest.mark.parametrize("shapes", CASES.values(), ids=CASES.keys())
def test_equals_the_reference_over_a_poisoned_pool(
    shapes: list[tuple[int, int]], window: int
) -> None:
    rows, cache = poisoned(shapes)
    q = queries(rows, cache)
    expected = reference_attention(rows, 1, q, cache, window)
    torch.testing.assert_close(
        attend(rows, cache, q, window=window).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_blocks_that_the_window_has_left_behind_are_not_read() -> None:
    rows, cache = poisoned([(30, 1), (22, 3), (40, 34)])
    q = queries(rows, cache)
    expected = attend(rows, cache, q, window=6)
    for row in rows:
        gone = row.block_ids[: (row.start - 6 + 1) // 4]
        cache.pool[list(gone)] = float("nan")
    assert torch.equal(attend(rows, cache, q, window=6), expected)


@pytest.mark.parametrize("block_size", [1, 16])
def test_block_size_does_not_matter(block_size: int) -> None:
    rows, cache = poisoned(CASES["everything"], block_size=block_size)
    q = queries(rows, cache)
    expected = reference_attention(rows, 0, q, cache)
    torch.testing.assert_close(attend(rows, cache, q, 0).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_good_as_its_inputs(dtype: str) -> None:
    rows, cache = poisoned(CASES["everything"], dtype=dtype)
    q = queries(rows, cache)
    out = attend(rows, cache, q)
    assert out.dtype == q.dtype
    expected = reference_attention(rows, 1, q, cache)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)


def test_infinities_in_unused_positions_do_not_matter_either() -> None:
    rows, cache = poisoned(CASES["everything"])
    q = queries(rows, cache)
    expected = attend(rows, cache, q)
    cache.pool[cache.pool.isnan()] = float("inf")
    assert torch.equal(attend(rows, cache, q), expected)


def test_the_same_step_gives_the_same_bits() -> None:
    rows, cache = poisoned(CASES["everything"])
    q = queries(rows, cache)
    first = attend(rows, cache, q)
    assert all(torch.equal(attend(rows, cache, q), first) for _ in range(5))


def test_two_plans_of_one_backend_do_not_disturb_each_other() -> None:
    rows, cache = poisoned(CASES["everything"])
    backend = TorchBackend(cache.layout, HEADS)
    q = queries(rows, cache)
    whole = backend.plan(build_batch(rows, 4, CPU))
    part = backend.plan(build_batch(rows[:2], 4, CPU))
    before = backend.run(whole, 1, q, cache)
    alone = backend.run(part, 1, q[:34], cache)
    assert torch.equal(backend.run(whole, 1, q, cache), before)
    torch.testing.assert_close(alone, before[:34], rtol=1e-5, atol=1e-5)


def test_groups_hold_every_row_once_and_little_padding() -> None:
    rng = random.Random(1)
    for _ in range(200):
        num_rows = rng.randint(1, 40)
        lengths = [rng.choice([1, 1, 1, 4, CHUNK_QUERIES, 200]) for _ in range(num_rows)]
        blocks = [rng.choice([1, 2, 10, 100, 500]) + rng.randint(0, 5) for _ in range(num_rows)]
        groups = group_rows(lengths, blocks)
        assert sorted(i for group in groups for i in group) == list(range(num_rows))
        for group in groups:
            if any(lengths[i] >= CHUNK_QUERIES for i in group):
                assert len(group) == 1
            widest, total = max(blocks[i] for i in group), sum(blocks[i] for i in group)
            assert widest * len(group) - total <= max(0.25 * total, 4 * len(group))
    assert group_rows([1] * 8, [20, 21, 19, 20, 20, 21, 20, 20]) == [[1, 5, 0, 3, 4, 6, 7, 2]]


@pytest.mark.parametrize("seed", range(12))
def test_random_ragged_batches(seed: int) -> None:
    """Rows that begin and end at any border of blocks and windows, as decode rows and chunks."""
    rng = random.Random(seed)
    size = rng.choice([1, 2, 3, 5, 16, 64])
    window = rng.choice([0, 0, 1, size, size + 1, 2 * size - 1, 50])
    shapes = []
    for _ in range(rng.randint(1, 6)):
        start = rng.choice([0, 1, size - 1, size, 2 * size, rng.randrange(90)])
        counts = [1, 2, size, CHUNK_QUERIES - 1, CHUNK_QUERIES, CHUNK_QUERIES + 1]
        shapes.append((start, rng.choice(counts)))
    rows, cache = poisoned(shapes, block_size=size)
    q = queries(rows, cache)
    expected = reference_attention(rows, 0, q, cache, window)
    out = attend(rows, cache, q, 0, window)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
