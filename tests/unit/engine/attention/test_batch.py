from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.attention.batch import Row, StepRows, TableStaging
from tests.support.backends import build_batch

CPU = torch.device("cpu")


@st.composite
def rows_of(draw: st.DrawFn) -> tuple[list[Row], int]:
    block_size = draw(st.integers(1, 5))
    rows = []
    for _ in range(draw(st.integers(0, 5))):
        token_ids = draw(st.lists(st.integers(0, 999), min_size=1, max_size=12))
        start = draw(st.integers(0, 20))
        need = -(-(start + len(token_ids)) // block_size)
        size = need + draw(st.integers(0, 2))
        block_ids = draw(st.lists(st.integers(0, 500), min_size=size, max_size=size))
        rows.append(Row(token_ids, start, block_ids, draw(st.integers(0, len(token_ids)))))
    return rows, block_size


@given(rows_of())
def test_a_batch_says_token_by_token_what_the_rows_say(case: tuple[list[Row], int]) -> None:
    rows, block_size = case
    batch = build_batch(rows, block_size, CPU)
    token_ids, positions, slots, logit_index = [], [], [], []
    for row in rows:
        for i, token in enumerate(row.token_ids):
            position = row.start + i
            if len(row.token_ids) - i <= row.num_logits:
                logit_index.append(len(token_ids))
            token_ids.append(token)
            positions.append(position)
            slots.append((row.block_ids[position // block_size], position % block_size))
    assert batch.token_ids.tolist() == token_ids
    assert batch.positions.tolist() == positions
    assert list(zip(batch.blocks[0].tolist(), batch.offsets.tolist(), strict=True)) == slots
    assert batch.logit_index.tolist() == logit_index
    assert (batch.num_tokens, batch.num_logits) == (len(token_ids), len(logit_index))
    assert all(t.dtype == torch.int64 for t in (batch.token_ids, batch.blocks, batch.logit_index))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row([], 0, [1], 0), "needs a token"),
        (Row([1], -1, [1], 0), "start of at least 0"),
        (Row([1, 2], 3, [1], 0), "1 blocks do not cover 5 positions"),
        (Row([1], 0, [1], 2), "num_logits must be 0 to 1"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(row: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_batch([Row([1], 0, [0], 1), row], 4, CPU)


def test_staged_tables_are_those_of_each_step() -> None:
    """Rows that stay, move, grow and go; arrays are known again by identity, lists never are."""
    staging, rng = TableStaging(), np.random.default_rng(0)
    before: list[Row] = []
    for _ in range(300):
        rows = before[: int(rng.integers(0, len(before) + 1))] if rng.random() < 0.7 else []
        for _ in range(rng.integers(1, 9)):
            ids = rng.integers(0, 1000, int(rng.integers(1, 40))).astype(np.int32)
            rows.append(Row([1], 0, ids if rng.random() < 0.5 else ids.tolist(), 1))
        tables = staging.lay_out(rows)[0]
        for table, row in zip(tables, rows, strict=False):
            assert table[: len(row.block_ids)].tolist() == list(row.block_ids)
        before = rows


@given(rows_of(), st.integers(0, 5))
def test_rows_as_arrays_are_the_same_rows(case: tuple[list[Row], int], cut: int) -> None:
    rows, block_size = case
    step = StepRows.of(rows)
    step.check(block_size)
    assert list(step) == rows == [step[i] for i in range(len(rows))]
    assert step[:cut] == rows[:cut]
    assert list(StepRows.of(rows[:cut]).followed_by(rows[cut:])) == rows
    with pytest.raises(IndexError):
        step[len(rows)]
