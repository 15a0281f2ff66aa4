"""A decode worker whose reads do not end: what it keeps, and how it frees that."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.base.errors import Unavailable
from engine.base.option_groups import TransferOptions
from engine.base.types import Role
from kvtransfer.transport import ReadState
from tests.support.worker_pair import (
    Ask,
    PairedWorker,
    answer,
    assert_at_rest,
    collect,
    decode_stub,
    pair,
    start,
    until,
)

pytestmark = pytest.mark.timeout(60)
LONG = tuple(range(41))  # ten whole blocks, two a chunk


async def _let_one_hang(p: PairedWorker, d: PairedWorker, ask: Ask) -> None:
    """A request whose first read hangs; the request itself ends as its peer's loss."""
    d.transport.gate = lambda read: ReadState.PENDING
    with pytest.raises(Unavailable) as caught:
        await collect(decode_stub(d).Decode(ask.pb(p), timeout=20), [])
    assert caught.value.lost == "prefill"


async def test_the_data_plane_begins_anew_and_everything_is_given_back() -> None:
    options = TransferOptions(pull_timeout_s=0.2, quarantine_s=0.5, quarantine_share=1.0)
    async with pair(decode={"transfer": options}) as (p, d):
        ask = Ask(LONG, 3)
        await _let_one_hang(p, d, ask)
        await until(lambda: d.pool().num_held == 2)
        assert d.host.load().quarantined_blocks == 2  # type: ignore[union-attr]
        assert d.host.plane.counters.num_restarts == 0
        await until(lambda: d.host.plane.counters.num_restarts == 1)
        d.transport.gate = lambda read: ReadState.DONE
        await assert_at_rest(p, d, timeout_s=5)
        assert d.host.load().quarantined_blocks == 0  # type: ignore[union-attr]
        assert not d.host.plane.died.done()
        assert await answer(d, p, ask) == ask.answer()
        assert d.host.plane.counters.num_blocks == 10, "they came from the same peer as before"
        await assert_at_rest(p, d)


async def test_other_requests_go_on_beside_a_quarantine_and_through_a_restart() -> None:
    options = TransferOptions(pull_timeout_s=1.0, quarantine_s=1.5, quarantine_share=1.0)
    async with pair(decode={"transfer": options}) as (p, d):
        other = await start(Role.PREFILL)
        stuck: list[Any] = []

        def gate(read: Any) -> ReadState:
            if not stuck:
                stuck.append(read)
            return ReadState.PENDING if read is stuck[0] else ReadState.DONE

        d.transport.gate = gate
        hanging = asyncio.create_task(
            collect(decode_stub(d).Decode(Ask(LONG, 3).pb(p), timeout=20), [])
        )
        await until(lambda: bool(stuck))
        asks = [Ask(tuple((7 * i + n) % 50 for n in range(30)), 40) for i in range(40)]
        answers = []
        for ask in asks:
            answers.append((ask, await answer(d, other, ask)))
            if d.host.plane.counters.num_restarts:
                break
            await asyncio.sleep(0.1)
        assert d.host.plane.counters.num_restarts == 1
        assert len(answers) > 5
        assert all(tokens == ask.answer() for ask, tokens in answers)
        with pytest.raises(Unavailable):
            await hanging
        assert d.host.plane.counters.num_blocks >= 5 * 7, "they were pulled"
        await assert_at_rest(p, d, other)
        await other.stop()
