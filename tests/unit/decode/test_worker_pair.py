"""Both workers under all faults at once: cancels, preemption, stale reads, lost peers.

At the end no block is held and no token is wrong.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from engine.base.kv_columns import FULL
from kvtransfer.transport import PeerLost, ReadState
from tests.support import worker_pair
from tests.support.worker_pair import (
    Ask,
    PairedWorker,
    Read,
    answer,
    assert_at_rest,
    collect,
    decode_stub,
    pair,
    random_ask,
)

pytestmark = pytest.mark.timeout(120)
SEEN: Counter[str] = Counter()


async def test_of_layers_with_a_window_only_what_is_read_travels() -> None:
    """A query behind ten blocks of four sees, with a window of 7, positions 34 to 40."""
    windows = (0, 7, 7)
    both: dict[str, Any] = {"num_blocks": 130, "prompt_tokens": 8, "windows": windows}
    async with pair(both, both) as (p, d):
        ask = Ask(tuple(range(41)), 6)
        assert await answer(d, p, ask) == ask.answer(windows)
        assert p.runner.num_tokens == 40
        assert d.host.plane.counters.num_blocks == 10 + 2 * 2
        await assert_at_rest(p, d)


@pytest.mark.parametrize("size", [1, 4, 7])
async def test_an_answer_through_both_workers(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of one token, of whole blocks to the token, and one more; each continues the last."""
    monkeypatch.setattr(worker_pair, "SIZE", size)
    async with pair({"num_blocks": 130}, {"num_blocks": 130}) as (p, d):
        for length in (1, size, size + 1, 2 * size, 2 * size + 1, 5 * size, 33):
            ask = Ask(tuple(range(length)), 6)
            assert await answer(d, p, ask) == ask.answer()
        await assert_at_rest(p, d)
        assert p.runner.num_tokens == 32 // size * size, "the last one's blocks were there already"


async def _cancelled(
    d: PairedWorker, p: PairedWorker, ask: Ask, after_s: float, windows: tuple[int, ...]
) -> None:
    call = decode_stub(d).Decode(ask.pb(p), timeout=20)
    tokens: list[int] = []
    reading = asyncio.create_task(collect(call, tokens))
    await asyncio.sleep(after_s)
    call.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert ask.answer(windows)[: len(tokens)] == tokens


async def _lose_leases(p: PairedWorker, owner: str, rng: random.Random) -> None:
    """What a stopped process or a lost network does: leases end while their blocks are read."""
    while True:
        await asyncio.sleep(rng.random() * 0.02)
        await p.lose_leases(owner)


@pytest.mark.parametrize(
    ("seed", "windows"), [*((seed, FULL) for seed in range(6)), (6, (0, 7, 7)), (7, (9,))]
)
async def test_a_storm(seed: int, windows: tuple[int, ...]) -> None:
    """Small pools preempt, lost leases make slow reads stale, reads fail, calls end: all at once.

    What a request sees depends on the seed alone, in which order it meets the others does not.
    """
    rng = random.Random(seed)

    def gate(read: Read) -> ReadState:
        if rng.random() < 0.0005:
            raise PeerLost("the test lost it")
        return ReadState.DONE if rng.random() < 0.03 else ReadState.PENDING

    scale = len(windows)
    decode = {"num_blocks": 33 * scale, "draft_tokens": 3}
    both: dict[str, Any] = {"prompt_tokens": 24, "windows": windows}
    async with pair({"num_blocks": 24 * scale, **both}, decode | both) as (p, d):
        d.transport.gate = gate
        thief = asyncio.create_task(_lose_leases(p, d.host.incarnation, rng))
        shared = [rng.randrange(50) for _ in range(40)]

        async def one() -> None:
            ask = random_ask(rng, shared, 50)
            await asyncio.sleep(rng.random() * 0.5)
            if rng.random() < 0.3:
                await _cancelled(d, p, ask, rng.random() * 0.3, windows)
            else:
                assert await answer(d, p, ask) == ask.answer(windows)

        async with asyncio.TaskGroup() as group:
            for _ in range(60):
                group.create_task(one())
        thief.cancel()
        await assert_at_rest(p, d)
        SEEN["stale"] += d.host.plane.counters.num_stale_blocks
        SEEN["failures"] += d.host.plane.counters.num_failures
        SEEN["preemptions"] += d.host.engine.core.scheduler.num_preemptions


def test_the_storms_were_storms() -> None:
    assert all(SEEN[what] > 0 for what in ("stale", "failures", "preemptions")), SEEN
