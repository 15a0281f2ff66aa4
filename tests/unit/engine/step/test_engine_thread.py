"""The engine thread's contract: order, one last event, clean-up without new work, death seen."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator

import pytest

from engine.base.errors import InvalidRequest
from engine.base.types import FinishReason, SamplingParams, StopParams
from engine.scheduling.events import FinishedEvent, TokensEvent
from engine.scheduling.request import EngineRequest
from engine.step.engine_thread import EngineDied, EngineThread, Stream
from tests.support.core_bench import SALT, Bench, oracle
from tests.support.engine_probe import Probe


def work(
    request_id: str, prompt: tuple[int, ...], max_tokens: int, fetch: bool = False
) -> EngineRequest:
    return EngineRequest(
        request_id, prompt, SALT, SamplingParams(), StopParams(max_tokens=max_tokens), fetch=fetch
    )


@pytest.fixture
async def engine() -> AsyncIterator[EngineThread]:
    bench = Bench(num_blocks=64, draft_tokens=3)
    core = bench.core
    bench.clock = time.monotonic
    thread = EngineThread(core, asyncio.get_running_loop())
    thread.start()
    yield thread
    await thread.stop()


async def tokens_of(stream: Stream) -> tuple[list[int], FinishedEvent]:
    tokens: list[int] = []
    while True:
        event = await stream.next()
        if isinstance(event, TokensEvent):
            tokens += event.token_ids
        elif isinstance(event, FinishedEvent):
            return tokens, event


async def test_concurrent_streams_give_their_own_tokens(engine: EngineThread) -> None:
    works = [work(f"r{i}", (i, i + 1, 7), 20) for i in range(8)]
    answers = await asyncio.gather(*(tokens_of(engine.submit(w)) for w in works))
    for w, (tokens, end) in zip(works, answers, strict=True):
        assert (tokens, end.reason) == oracle(w)
    assert await engine.call(Probe(lambda core: core.pool.num_held)) == 0


@pytest.mark.parametrize("idle", [True, False])
async def test_a_message_that_does_not_end_is_a_hang(
    engine: EngineThread, monkeypatch: pytest.MonkeyPatch, idle: bool
) -> None:
    """Not only a step: for an engine that hangs no heartbeat is sent."""
    monkeypatch.setattr("engine.step.engine_thread.STUCK_S", 0.1)
    if not idle:
        engine.submit(work("waits", tuple(range(20)), 5))
    gate = threading.Event()
    engine.post(Probe(lambda core: gate.wait(20) and None))
    try:
        async with asyncio.timeout(10):
            while engine.responsive:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    finally:
        gate.set()
    async with asyncio.timeout(10):
        while not engine.responsive:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_abort_frees_without_new_work(engine: EngineThread) -> None:
    stream = engine.submit(work("waits", tuple(range(20)), 5, fetch=True))
    await stream.next()  # its fetch; no peer sends the blocks
    assert await engine.call(Probe(lambda core: core.pool.num_held)) > 0
    stream.abort()
    (last,) = await stream.drain()
    assert isinstance(last, FinishedEvent)
    assert last.reason is FinishReason.ABORTED
    assert stream.finished
    assert await engine.call(Probe(lambda core: core.pool.num_held)) == 0
    stream.abort()  # again is no error


async def test_calls_return_values_and_errors(engine: EngineThread) -> None:
    assert await engine.call(Probe(lambda core: core.pool.num_blocks)) == 64
    with pytest.raises(ZeroDivisionError):
        await engine.call(Probe(lambda core: 1 // 0))
    assert await engine.call(Probe(lambda core: 5)) == 5


async def test_what_can_never_fit_is_refused_before_it_is_queued(engine: EngineThread) -> None:
    with pytest.raises(InvalidRequest):
        engine.submit(work("long", tuple([1] * 300), 5))


async def test_a_pushed_error_reaches_the_reader_and_ends_nothing(engine: EngineThread) -> None:
    stream = engine.submit(work("fetches", tuple(range(20)), 5, fetch=True))
    await stream.next()
    stream.push(InvalidRequest("field", "reason"))
    with pytest.raises(InvalidRequest):
        await stream.next()
    assert not stream.finished
    stream.abort()
    await stream.drain()
    assert stream.finished


async def test_every_stream_ends_when_the_thread_dies(engine: EngineThread) -> None:
    stream = engine.submit(work("victim", tuple(range(20)), 50, fetch=True))
    await stream.next()

    def die(_core: object) -> None:
        raise SystemError("boom")

    engine.post(Probe(die))
    with pytest.raises(EngineDied):
        await stream.next()
    await asyncio.wait_for(engine.died.wait(), 5)
    with pytest.raises(EngineDied):
        engine.submit(work("late", (1,), 1))


async def test_a_waiter_takes_over_with_no_message_at_all(engine: EngineThread) -> None:
    """Its deadline passes while nothing else happens in the process."""
    prompt = tuple(range(21))
    budgets = engine.core.scheduler.budgets
    object.__setattr__(budgets, "owner_wait_s", 0.3)
    producer = engine.submit(work("producer", prompt, 5, fetch=True))
    await producer.next()
    waiter = engine.submit(work("waiter", prompt, 5))
    tokens, _ = await asyncio.wait_for(tokens_of(waiter), 5)
    assert tokens == oracle(work("waiter", prompt, 5))[0]
    producer.abort()
    await producer.drain()
