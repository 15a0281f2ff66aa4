"""The client library against coordinators on real ports, with scripted failures."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import structlog

from coordinator.client import AsyncClient, Client, Done, RetryPolicy, TextDelta
from engine.base.errors import (
    DeadlineExceeded,
    DiptychError,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from tests.support.fake_coordinator import (
    ANSWER,
    BARE,
    LOSSES,
    SAID,
    Cue,
    FakeCoordinator,
    of_choice,
    whole,
)

KINDS = ("blocking", "asyncio")
# A slow machine loses no call of a test that is not about time.
PATIENT = RetryPolicy(give_up_s=20.0, backoff_s=0.01, max_backoff_s=0.05, silence_s=20.0)
QUICK = replace(PATIENT, give_up_s=1.0)  # where the last coordinator does not answer either
TEXT = whole(ANSWER)


class Got:
    """The events that a user of the client has received."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""
        self.done: Done | None = None
        self.error: Exception | None = None
        self.num_resumed = 0

    def take(self, event: Any) -> None:
        if isinstance(event, TextDelta):
            self.tokens += event.token_ids
            self.text += event.text
        else:
            self.done = event

    def check(self) -> None:
        assert self.error is None, repr(self.error)
        assert (tuple(self.tokens), self.text) == (ANSWER, TEXT)
        assert self.done is not None
        assert self.done.usage.completion_tokens == len(ANSWER)


async def ask(
    kind: str,
    addresses: str,
    *,
    retry_policy: RetryPolicy = PATIENT,
    seed: int = 1,
    **options: Any,
) -> Got:
    """One output by one of the two clients; an error is kept."""
    got, rng = Got(), random.Random(seed)
    options = {"timeout_s": 30.0, **options}

    def blocking() -> None:
        with Client(addresses, retry_policy=retry_policy, rng=rng) as client:
            try:
                for event in client.generate("x", **options):
                    got.take(event)
            except (DiptychError, grpc.RpcError) as error:
                got.error = error
            got.num_resumed = client.num_resumed

    async def for_asyncio() -> None:
        async with AsyncClient(addresses, retry_policy=retry_policy, rng=rng) as client:
            try:
                async for event in client.generate("x", **options):
                    got.take(event)
            except (DiptychError, grpc.RpcError) as error:
                got.error = error
            got.num_resumed = client.num_resumed

    await (asyncio.to_thread(blocking) if kind == "blocking" else for_asyncio())
    return got


@contextlib.asynccontextmanager
async def coordinators(*scripts: dict[str, Any]) -> AsyncIterator[list[FakeCoordinator]]:
    fakes = [FakeCoordinator(**script) for script in scripts]
    for fake in fakes:
        await fake.start()
    try:
        yield fakes
    finally:
        for fake in fakes:
            await fake.stop()


def both(fakes: list[FakeCoordinator]) -> str:
    return ",".join(fake.address for fake in fakes)


def unserved() -> str:
    """An address without a listener."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{sock.getsockname()[1]}"


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", KINDS)
async def test_an_unreachable_coordinator_is_skipped(kind: str) -> None:
    async with coordinators({}) as fakes:
        began = time.monotonic()
        got = await ask(kind, f"{unserved()},{fakes[0].address}")
        got.check()
        assert got.num_resumed == 0
        assert time.monotonic() - began < 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [1, 7, 20])
async def test_a_coordinator_that_dies_within_a_stream_is_a_pause(kind: str, after: int) -> None:
    async with coordinators({"cues": [Cue(after, "vanish")], "pace_s": 0.002}, {}) as fakes:
        began = time.monotonic()
        got = await ask(kind, both(fakes), temperature=1.0)
        got.check()
        assert time.monotonic() - began < 2, "no wait where another one is there"
        (first,), (second,) = fakes[0].requests, fakes[1].requests
        assert first.request_id == second.request_id == got.done.request_id  # type: ignore[union-attr]
        assert not first.resume
        assert tuple(second.resume[0].token_ids) == ANSWER[: 2 * after]
        assert got.num_resumed == got.done.num_resumed == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [1, 20, 60, 63])
async def test_a_resumed_output_has_no_gap_in_any_choice(kind: str, after: int) -> None:
    script = {"tail": True, "pace_s": 0.002}
    async with coordinators({**script, "cues": [Cue(after, "vanish")]}, script) as fakes:
        got = [Got() for _ in range(3)]

        def blocking() -> None:
            with Client(both(fakes), retry_policy=PATIENT) as client:
                for event in client.generate("x", n=3, timeout_s=30):
                    got[event.index].take(event)

        async def for_asyncio() -> None:
            async with AsyncClient(both(fakes), retry_policy=PATIENT) as client:
                async for event in client.generate("x", n=3, timeout_s=30):
                    got[event.index].take(event)

        await (asyncio.to_thread(blocking) if kind == "blocking" else for_asyncio())
        for index, choice in enumerate(got):
            assert choice.tokens == of_choice(ANSWER, index)
            assert choice.text == whole(choice.tokens)
            assert choice.done is not None
            assert choice.done.index == index
        assert [len(fake.requests) for fake in fakes] == [1, 1]
        told = {r.index: r for r in fakes[1].requests[0].resume}
        assert len(told) == min(after, 3)
        assert any(r.finished for r in told.values()) == (after == 63)


@pytest.mark.parametrize("kind", KINDS)
async def test_the_only_coordinator_is_retried(kind: str) -> None:
    script = {"cues": [Cue(5, "vanish")], "pace_s": 0.002, "back_s": 0.7}
    async with coordinators(script) as fakes:
        got = await ask(kind, fakes[0].address, retry_policy=RetryPolicy())
        got.check()
        assert got.num_resumed == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", LOSSES)
async def test_every_kind_of_loss(kind: str, how: str) -> None:
    async with coordinators({"cues": [Cue(3, how)]}, {}) as fakes:
        (await ask(kind, both(fakes))).check()
        assert tuple(fakes[1].requests[0].resume[0].token_ids) == ANSWER[:6]
    async with coordinators({"cues": [Cue(0, how)]}, {}) as fakes:
        got = await ask(kind, both(fakes))
        got.check()
        assert got.num_resumed == 0
        assert len(fakes[1].requests) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("how", ["invalid", "missing", "bug"])
async def test_a_final_error_is_raised_at_once(kind: str, after: int, how: str) -> None:
    async with coordinators({"cues": [Cue(after, how)]}, {}) as fakes:
        got = await ask(kind, both(fakes))
        assert len(got.tokens) == 2 * after
        assert not fakes[1].requests
        if how == "bug":
            assert isinstance(got.error, grpc.RpcError)
            assert got.error.code() is grpc.StatusCode.INTERNAL  # type: ignore[attr-defined]
        else:
            assert type(got.error) is type(SAID[how])


@pytest.mark.parametrize("kind", KINDS)
async def test_the_last_error_has_the_number_of_delivered_tokens(kind: str) -> None:
    cues = [Cue(4, "cut"), *[Cue(0, "unavailable")] * 100]
    async with coordinators({"cues": list(cues)}, {"cues": cues[1:]}) as fakes:
        got = await ask(kind, both(fakes), retry_policy=QUICK)
        assert isinstance(got.error, Unavailable)
        assert got.error.num_emitted == 8
        assert "shutting down" in got.error.message
        assert tuple(got.tokens) == ANSWER[:8]
        assert all(not r.resume or len(r.resume[0].token_ids) == 8 for r in fakes[1].requests)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_full_coordinator_is_skipped_and_all_full_is_overloaded(kind: str) -> None:
    async with coordinators({"cues": [Cue(0, "overloaded")] * 50}, {}) as fakes:
        (await ask(kind, both(fakes))).check()
        assert len(fakes[0].requests) == 1
        fakes[1].cues = [Cue(0, "overloaded")] * 50
        got = await ask(kind, both(fakes), retry_policy=QUICK)
        assert isinstance(got.error, Overloaded)


@pytest.mark.parametrize("kind", KINDS)
async def test_one_coordinator_is_retried_by_grpc_itself(kind: str) -> None:
    cues = [Cue(0, "overloaded"), Cue(0, "unavailable"), Cue(0, "cut")]
    async with coordinators({"cues": cues}) as fakes:
        (await ask(kind, fakes[0].address)).check()
        assert len(fakes[0].requests) == 4


@pytest.mark.parametrize("kind", KINDS)
async def test_timeout_s_bounds_all_attempts(kind: str) -> None:
    async with coordinators(
        {"cues": [Cue(3, "cut")], "pace_s": 0.1}, {"cues": [Cue(1, "silent")]}
    ) as fakes:
        began = time.monotonic()
        got = await ask(kind, both(fakes), timeout_s=1.2)
        assert isinstance(got.error, DeadlineExceeded)
        assert 1.1 < time.monotonic() - began < 2.5
        assert tuple(got.tokens) == ANSWER[:8]
        (before,), (after,) = fakes[0].deadlines, fakes[1].deadlines
        assert before is not None
        assert after is not None
        assert after < before - 0.25, "what is left is passed on"
        await until(lambda: fakes[1].num_cancelled == 1)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_lost_end_is_requested_again(kind: str) -> None:
    for tail in (False, True):
        last = len(ANSWER) // 2 + tail
        scripts = ({"cues": [Cue(last, "end")], "tail": tail}, {"tail": tail})
        async with coordinators(*scripts) as fakes:
            (await ask(kind, both(fakes))).check()
            assert tuple(fakes[1].requests[0].resume[0].token_ids) == ANSWER


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_stays_with_its_coordinator(kind: str) -> None:
    async with coordinators({"cues": [Cue(2, "cut")]}, {}) as fakes:

        def blocking() -> None:
            with Client(both(fakes)) as client:
                for _ in range(3):
                    list(client.generate("x", timeout_s=10))

        async def for_asyncio() -> None:
            async with AsyncClient(both(fakes)) as client:
                for _ in range(3):
                    _ = [event async for event in client.generate("x", timeout_s=10)]

        await (asyncio.to_thread(blocking) if kind == "blocking" else for_asyncio())
        assert [len(fake.requests) for fake in fakes] == [1, 3]


@pytest.mark.parametrize("kind", KINDS)
async def test_closing_the_iterator_cancels_the_call(kind: str) -> None:
    async with coordinators({"pace_s": 0.02}) as fakes:

        def blocking() -> None:
            with Client(fakes[0].address) as client:
                events = client.generate("x", timeout_s=10)
                next(events)
                events.close()  # type: ignore[attr-defined]
                time.sleep(1.0)

        async def for_asyncio() -> None:
            async with AsyncClient(fakes[0].address) as client:
                events = client.generate("x", timeout_s=10)
                await anext(events)
                await events.aclose()  # type: ignore[attr-defined]
                await asyncio.sleep(1.0)

        running = asyncio.create_task(
            asyncio.to_thread(blocking) if kind == "blocking" else for_asyncio()  # type: ignore[arg-type]
        )
        await until(lambda: fakes[0].num_cancelled == 1, 0.9)
        await running
        assert len(fakes[0].requests) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_an_unread_iterator_makes_no_call_and_a_dropped_one_ends(
    kind: str,
) -> None:
    async with coordinators({"pace_s": 0.02}) as fakes:
        client: Any = Client(both(fakes)) if kind == "blocking" else AsyncClient(both(fakes))
        events = client.generate("x", timeout_s=30)
        await asyncio.sleep(0.2)
        assert not fakes[0].requests
        if kind == "blocking":
            await asyncio.to_thread(next, events)
        else:
            await anext(events)
        del events
        await until(lambda: fakes[0].num_cancelled == 1)
        closed = client.close()
        if kind == "asyncio":
            await closed


@pytest.mark.parametrize("kind", KINDS)
async def test_closing_the_client_ends_its_outputs(kind: str) -> None:
    async with coordinators({"pace_s": 0.02}, {}) as fakes:
        got = Got()
        client: Any = Client(both(fakes)) if kind == "blocking" else AsyncClient(both(fakes))

        def blocking() -> None:
            for event in client.generate("x", timeout_s=10):
                got.take(event)

        async def for_asyncio() -> None:
            async for event in client.generate("x", timeout_s=10):
                got.take(event)

        reading = asyncio.create_task(
            asyncio.to_thread(blocking) if kind == "blocking" else for_asyncio()  # type: ignore[arg-type]
        )
        await until(lambda: got.tokens)
        closed = client.close()
        if kind == "asyncio":
            await closed
        with pytest.raises(Unavailable, match="closed") as caught:
            await reading
        assert caught.value.num_emitted == len(got.tokens)
        assert not fakes[1].requests


async def test_cancelling_a_task_cancels_only_its_call() -> None:
    async with coordinators({"pace_s": 0.02}, {}) as fakes:
        async with AsyncClient(both(fakes)) as client:

            async def read() -> None:
                async for _ in client.generate("x", timeout_s=10):
                    pass

            task = asyncio.create_task(read())
            await until(lambda: fakes[0].requests)
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: fakes[0].num_cancelled == 1)
        assert not fakes[1].requests


@pytest.mark.parametrize("kind", KINDS)
async def test_unary_calls_go_to_a_reachable_coordinator(kind: str) -> None:
    async with coordinators({}) as fakes:
        addresses, port = f"{unserved()},{fakes[0].address}", str(fakes[0].port)

        def blocking() -> tuple[str, str]:
            with Client(addresses) as client:
                return client.model(timeout_s=5).name, client.workers(timeout_s=5)[0].worker_id

        async def for_asyncio() -> tuple[str, str]:
            async with AsyncClient(addresses) as client:
                model, workers = await client.model(), await client.workers()
                return model.name, workers[0].worker_id

        asking: Any = asyncio.to_thread(blocking) if kind == "blocking" else for_asyncio()
        assert await asking == (f"of {port}", port)


async def test_one_blocking_client_serves_many_threads() -> None:
    scripts = [
        {"cues": [Cue(i % 9, "cut") for i in range(12)], "pace_s": 0.005},
        {"cues": [Cue(i % 5, "unavailable") for i in range(12)], "pace_s": 0.005},
    ]
    async with coordinators(*scripts) as fakes:
        with Client(both(fakes), retry_policy=PATIENT) as client:

            def read(_: int) -> Got:
                got = Got()
                for event in client.generate("x", timeout_s=20):
                    got.take(event)
                return got

            for got in await asyncio.gather(*(asyncio.to_thread(read, i) for i in range(16))):
                got.check()
            assert client.num_resumed >= 8
        ids = {r.request_id for fake in fakes for r in fake.requests}
        assert len(ids) == 16


@pytest.mark.parametrize("kind", KINDS)
async def test_random_scripts_on_real_connections(kind: str) -> None:
    """Always the output, or an error with the number of delivered tokens."""
    rng = random.Random(2024)
    num_whole = num_cut = 0
    for seed in range(60):
        how = [*LOSSES, *BARE, "vanish"]
        scripts = [
            {
                "cues": [
                    Cue(rng.randint(0, 21), rng.choice(how)) for _ in range(rng.randint(0, 6))
                ],
                "group": rng.choice((1, 2, 5)),
                "back_s": rng.choice((None, 0.05)),
            }
            for _ in range(rng.choice((1, 2, 3)))
        ]
        async with coordinators(*scripts) as fakes:
            got = await ask(kind, both(fakes), retry_policy=QUICK, seed=seed)
        assert tuple(got.tokens) == ANSWER[: len(got.tokens)], seed
        assert TEXT.startswith(got.text), seed
        if got.error is None:
            got.check()
            num_whole += 1
        else:
            assert isinstance(got.error, Unavailable | Overloaded), (seed, got.error)
            if isinstance(got.error, Unavailable):
                assert got.error.num_emitted == len(got.tokens), seed
            num_cut += 1
    assert num_whole >= 30
    assert num_cut >= 1


@contextlib.contextmanager
def process_at(port: int, first_s: float = 0.0) -> Iterator[subprocess.Popen[bytes]]:
    """A coordinator that can be stopped."""
    command = [sys.executable, "-m", "tests.support.fake_coordinator", str(port), str(first_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stopped_coordinator_is_detected_by_silence(kind: str) -> None:
    """One ping interval, and one more until the connection counts as lost."""
    port = int(unserved().rpartition(":")[2])
    with process_at(port) as process:
        async with coordinators({}) as fakes:
            retry_policy, addresses = (
                RetryPolicy(ping_s=1.0),
                f"127.0.0.1:{port},{fakes[0].address}",
            )
            asking = asyncio.create_task(ask(kind, addresses, retry_policy=retry_policy))
            await asyncio.sleep(0.7)
            process.send_signal(signal.SIGSTOP)
            stopped = time.monotonic()
            await until(lambda: fakes[0].requests, 6)
            took_s = time.monotonic() - stopped
            got = await asking
            got.check()
            assert got.num_resumed == 1
            assert 0.9 < took_s < 4.0, f"noticed after {took_s:.1f} s"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first_s", [0.0, 60.0])
async def test_a_coordinator_with_a_hanging_event_loop_is_detected_by_silence(
    kind: str, first_s: float
) -> None:
    """Its connection answers pings. Within an output, and before the first token."""
    port = int(unserved().rpartition(":")[2])
    with process_at(port, first_s) as process:
        async with coordinators({}) as fakes:
            addresses = f"127.0.0.1:{port},{fakes[0].address}"
            asking = asyncio.create_task(ask(kind, addresses, retry_policy=RetryPolicy()))
            await asyncio.sleep(1.5)
            assert not fakes[0].requests
            process.send_signal(signal.SIGUSR1)
            stuck = time.monotonic()
            await until(lambda: fakes[0].requests, 8)
            took_s = time.monotonic() - stuck
            got = await asking
            got.check()
            assert got.num_resumed == (0 if first_s else 1)
            assert 1.4 < took_s < 6.0, f"noticed after {took_s:.1f} s"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_slow_coordinator_is_not_lost(kind: str) -> None:
    """It sends `Alive`; the time in which the user handles an event does not count."""
    async with coordinators({"first_s": 4.0}, {}) as fakes:
        got = await ask(kind, both(fakes), retry_policy=RetryPolicy())
        got.check()
        assert [len(fake.requests) for fake in fakes] == [1, 0]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_only_one_that_hangs_gets_more_time_with_each_call(kind: str) -> None:
    """It needs 1.5 s to respond and sends no `Alive`, as if its event loop were late."""
    cues = [Cue(99, "stuck")] * 4
    async with coordinators({"first_s": 1.5, "cues": cues}) as fakes:
        got = await ask(kind, fakes[0].address, retry_policy=RetryPolicy(silence_s=0.5))
        got.check()
        assert len(fakes[0].requests) == 3


@pytest.mark.parametrize("kind", KINDS)
async def test_a_slow_user_loses_no_call(kind: str) -> None:
    async with coordinators({"pace_s": 0.01}, {}) as fakes:
        got, quick = Got(), RetryPolicy(silence_s=0.6)

        def blocking() -> None:
            with Client(both(fakes), retry_policy=quick) as client:
                for i, event in enumerate(client.generate("x", timeout_s=30)):
                    got.take(event)
                    time.sleep(1.5 if i == 3 else 0)

        async def for_asyncio() -> None:
            async with AsyncClient(both(fakes), retry_policy=quick) as client:
                i = 0
                async for event in client.generate("x", timeout_s=30):
                    got.take(event)
                    i += 1
                    await asyncio.sleep(1.5 if i == 3 else 0)
                    if i == 5:
                        time.sleep(1.5)  # noqa: ASYNC251  (its own event loop hangs)

        if kind == "blocking":
            await asyncio.to_thread(blocking)
        else:
            await for_asyncio()
        got.check()
        assert [len(fake.requests) for fake in fakes] == [1, 0]


async def test_pings_during_a_silence_are_allowed() -> None:
    """By default a server would send GOAWAY (too_many_pings); ours counts no pings."""
    async with coordinators({"first_s": 6.0}) as fakes:
        got = await ask("asyncio", fakes[0].address, retry_policy=RetryPolicy(ping_s=0.25))
        got.check()
        assert len(fakes[0].requests) == 1


async def test_a_lost_call_is_logged_with_its_request() -> None:
    async with coordinators({"cues": [Cue(3, "cut")]}, {}) as fakes:
        structlog.configure()
        try:
            with structlog.testing.capture_logs() as lines:
                (await ask("blocking", both(fakes), request_id="r-7")).check()
        finally:
            structlog.reset_defaults()
    (line,) = [line for line in lines if line["event"] == "call lost"]
    assert line["request_id"] == "r-7"
    assert line["coordinator"] == fakes[0].address
    assert line["num_tokens"] == 6
    assert "as scripted" in line["reason"]


async def test_without_structlog_the_line_goes_to_logging(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    structlog.reset_defaults()
    async with coordinators({"cues": [Cue(3, "cut")]}, {}) as fakes:
        with caplog.at_level(logging.WARNING, "coordinator.client"):
            (await ask("asyncio", both(fakes), request_id="r-7")).check()
    (record,) = [r for r in caplog.records if r.name == "coordinator.client"]
    assert "call lost" in record.getMessage()
    assert "request_id='r-7'" in record.getMessage()
    assert capsys.readouterr().out == ""


def test_unknown_options_and_addresses_are_refused_at_once() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(TypeError, match="tempo"):
        client.generate("x", tempo=1)
    with pytest.raises(ValueError, match="HOST:PORT"):
        Client("a:1,,")


async def test_bad_parameters_name_their_field() -> None:
    async with coordinators({"cues": [Cue(0, "invalid")]}) as fakes:
        got = await ask("asyncio", fakes[0].address)
        assert isinstance(got.error, InvalidRequest)
        assert got.error.field == "sampling.top_p"
