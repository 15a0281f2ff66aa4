"""Columns of block tables: which layers share a block, and what a window keeps."""

from __future__ import annotations

import random

import pytest

from engine.base.kv_columns import (
    MAX_COLUMNS,
    blocks_needed,
    deal,
    longest_text,
    most_held,
)
from engine.base.kv_layout import block_hash, column_hash
from engine.base.types import SamplingParams, StopParams
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.block_table import BlockTable
from engine.scheduling.prefix_hits import find_hits
from engine.scheduling.request import EngineRequest
from tests.support.core_bench import SALT, SIZE, Bench, oracle

GEMMA3_270M = [0 if i % 6 == 5 else 512 for i in range(18)]


@pytest.mark.parametrize(
    ("windows", "context", "expected"),
    [
        ([0] * 30, 8192, ((0,), 30)),
        ([4096] * 32, 32768, ((4096,), 32)),
        ([4096] * 32, 4096, ((0,), 32)),  # never longer than the window
        ([4096, 0] * 13, 8192, ((0, 4096), 13)),
        (GEMMA3_270M, 32768, ((0, *[512] * 5), 3)),
        ([0 if i % 6 == 5 else 1024 for i in range(62)], 131072, ((0, *[1024] * 4), 13)),
        ([0, 16, 32], 64, ((0, 16, 32), 1)),
    ],
)
def test_layers_are_dealt_with_little_padding(
    windows: list[int], context: int, expected: tuple[tuple[int, ...], int]
) -> None:
    columns = deal(windows, context)
    assert (columns.windows, columns.num_layers) == expected
    assert len(set(columns.places)) == len(windows), "two layers at one place"
    for window, (column, place) in zip(windows, columns.places, strict=True):
        assert columns.windows[column] == (window if window < context else 0)
        assert place < columns.num_layers
    assert len(columns.windows) <= MAX_COLUMNS


@pytest.mark.parametrize("windows", [(0,), (9,), (0, 9, 9), (0, 5, 17)])
def test_the_longest_text_is_the_longest_that_fits(windows: tuple[int, ...]) -> None:
    for num_blocks in range(12, 80, 7):
        longest = longest_text(windows, num_blocks, 4, 3)
        assert blocks_needed(windows, min(longest, 10**6), 4, 3) <= num_blocks
        if any(window == 0 for window in windows):
            assert blocks_needed(windows, longest + 1, 4, 3) > num_blocks


@pytest.mark.parametrize("window", [1, 2, 7, 8, 9])
def test_a_table_holds_what_queries_read_and_little_more(window: int) -> None:
    ahead, length = 3, 60
    pool = BlockPool(100)
    table = BlockTable(pool, SIZE, (0, window), ahead)
    table.open([[], []], 0, 0, length // SIZE)
    for position in range(length):
        table.reserve_ahead(position)
        read = {p // SIZE for p in range(max(0, position - window + 1), position + 1)}
        held = {i for i in range(table.num_entries) if any(c for c, _ in table.entry(i))}
        assert read <= held
        assert len(table.held(0, 100)) <= length // SIZE + most_held(window, SIZE, ahead)
        assert set(table.ids[:, 1].tolist()) <= set(table.blocks), "a released id is shown"
        assert pool.num_held == len(table.blocks)
        table.release_behind(position + 1)
        assert table.covers(position + 1)
    table.release()
    assert pool.num_held == 0


def test_hits_end_where_a_window_lacks_a_block() -> None:
    windows, pool = (0, 6), BlockPool(64)
    hashes = [block_hash(b"", [i] * SIZE, SALT) for i in range(8)]
    rng = random.Random(1)
    for _ in range(300):
        present = {(i, c) for i in range(8) for c in (0, 1) if rng.random() < 0.8}
        pool = BlockPool(64)
        for entry, column in sorted(present):
            (block,) = pool.take(1)
            pool.set_hash(block, column_hash(hashes[entry], column))
        run = next((i for i in range(8) if (i, 0) not in present), 8)

        def usable(end: int, position: int) -> bool:
            needed = range(min(end, (position - 5) // SIZE if position > 5 else 0), end)
            return all((i, 1) in present for i in needed)  # noqa: B023

        here = max(end for end in range(run + 1) if usable(end, end * SIZE))
        assert find_hits(pool, hashes, windows, SIZE).num_entries == here
        behind = find_hits(pool, hashes, windows, SIZE, 8 * SIZE)
        assert behind.num_entries == max(e for e in range(run + 1) if usable(e, 8 * SIZE))


def test_a_long_answer_fits_into_the_blocks_of_its_window() -> None:
    windows = (9,)
    bench = Bench(12, 16, max_model_len=200, windows=windows)
    prompt = tuple(i % 50 for i in range(60))
    work = EngineRequest("r", prompt, SALT, SamplingParams(), StopParams(max_tokens=100))
    key = bench.add(work)
    bench.run()
    assert bench.tokens[key] == oracle(work, windows=windows)[0]
    assert bench.scheduler.num_preemptions == 0
    bench.at_rest()


def test_a_peer_that_stops_half_way_is_replaced_from_the_start() -> None:
    """What it sent of the layers that see all is there; the window's blocks were to come last."""
    windows, rng = (0, 6), random.Random(2)
    prompt = tuple(rng.randrange(50) for _ in range(6 * SIZE + 1))
    work = EngineRequest("f", prompt, SALT, SamplingParams(), StopParams(max_tokens=6), fetch=True)
    bench = Bench(windows=windows)
    key = bench.add(work)
    bench.step()
    (event,) = bench.fetches
    assert event.counts == [1, 1, 1, 1, 2, 2]
    for entry in range(3):
        first = entry * SIZE
        bench.write(event.block_ids[entry : entry + 1], event.token_ids[first : first + SIZE])
    bench.core.blocks_arrived(key, 3)
    bench.core.fetch_ended(key, 0)
    bench.run()
    assert bench.tokens[key] == oracle(work, windows=windows)[0]
    assert bench.core.totals.prompt_tokens_computed == len(prompt)
    # Another request for the same prompt goes on behind what the first one left.
    bench.add(work)
    bench.step()
    assert not bench.fetches[1:], "everything is here"
    bench.run()
    bench.at_rest()
