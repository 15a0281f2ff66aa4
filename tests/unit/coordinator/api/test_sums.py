"""Bounds of sums: JSON, prompts that repeat a request, choices that share large parts."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.api.openai.body import parse_body
from coordinator.api.openai.errors import Refused
from coordinator.api.openai.requests import read_completion
from coordinator.api.validation.tools import UNPARSED, check_tool_calls
from coordinator.generation.output import Output
from coordinator.generation.shared_parts import SharedParts
from coordinator.text import json_bounds as nesting
from coordinator.text import stops as stops_module
from coordinator.text.served_model import Limits
from coordinator.text.stops import StopChecker, StopSet
from engine.base.errors import DeadlineExceeded, InvalidRequest, Silent
from engine.pb.diptych.v1 import inference_pb2 as pb
from engine.rpc.liveness import next_message
from tests.support.fake_decode import Cue
from tests.support.fake_decode import lost as lost_error
from tests.support.grpc_front import collect, front, stop
from tests.support.validated import validated

MANY = nesting.MAX_ITEMS
TOO_MUCH = {
    "arrays": "[" + "[]," * nesting.MAX_CONTAINERS + "1]",
    "objects": "[" + "{}," * nesting.MAX_CONTAINERS + "1]",
    "numbers": "[" + "1," * MANY + "1]",
    "texts": "[" + '"a",' * MANY + '"b"]',
    "names": "{" + ",".join(f'"{i}":1' for i in range(MANY // 2 + 1)) + "}",
}


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_json_of_too_many_values_is_refused_before_it_is_parsed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(ValueError, match="more than"):
        nesting.loads(TOO_MUCH[kind])
    body = f'{{"model": "m", "prompt": "x", "metadata": {TOO_MUCH[kind]}}}'
    with pytest.raises(Refused) as caught:
        parse_body(body.encode())
    assert caught.value.failure.status == 400
    assert str(MANY) in caught.value.failure.message


@pytest.mark.parametrize("number", ["1" * 4000, "0." + "1" * 4000, "-" + "1" * 4000])
def test_numbers_of_thousands_of_digits_are_refused(number: str) -> None:
    body = f'{{"model": "m", "prompt": "x", "metadata": [{f"{number}," * 50}1]}}'
    with pytest.raises(Refused, match="digits"):
        parse_body(body.encode())


def test_a_count_looks_at_a_piece_at_a_time() -> None:
    space = " " * 3 * nesting._PIECE_CHARS
    assert nesting.num_items(f'{space}[{space}"a",{space}{{{space}"b":1}}{space}]{space}') == 5


def test_much_json_within_the_bounds_is_read() -> None:
    text = "[{]}," * 2_000_000  # characters of a text do not count
    body = {"prompt": text, "logit_bias": {str(i): 1.5 for i in range(49_152)}}
    assert parse_body(json.dumps(body).encode()) == body
    ids = list(range(200_000))
    assert nesting.loads(json.dumps(ids)) == ids


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def items_of(value: object) -> int:
    """Counted in the value, not in its text."""
    if isinstance(value, str):
        return 1
    if isinstance(value, list):
        return 1 + max(0, len(value) - 1) + sum(map(items_of, value))
    if isinstance(value, dict):
        size = len(value)
        return 1 + max(0, size - 1) + size + sum(map(items_of, value.values()))
    return 0


@given(json_values, st.booleans())
def test_items_are_counted_as_they_are(value: object, ascii_only: bool) -> None:
    assert nesting.num_items(json.dumps(value, ensure_ascii=ascii_only)) == items_of(value)


@given(st.text(alphabet='[]{}",\\:a1 ', max_size=40))
def test_counting_ends_on_any_text(source: str) -> None:
    nesting.num_items(source)


def test_arguments_of_all_calls_are_bounded_in_sum() -> None:
    one = json.dumps({"a": list(range(30_000))})
    items = nesting.Items()
    calls = [pb.ToolCall(name="f", arguments=one)] * 20
    read = check_tool_calls("c", calls, items)
    parsed = [call for call in read if UNPARSED not in call.arguments]
    assert len(parsed) == 8  # of 30,002 items each
    assert read[-1].arguments == {UNPARSED: one}


def test_prompts_that_repeat_large_fields_are_refused() -> None:
    bias = {str(i): 1.0 for i in range(40_000)}
    body = {"prompt": ["a"] * 1024, "logit_bias": bias}
    with pytest.raises(InvalidRequest) as caught:
        read_completion(body, "r")
    assert caught.value.field == "prompt"
    assert len(read_completion({**body, "prompt": ["a"] * 4}, "r").requests) == 4


def test_many_stop_strings_take_one_step_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = StopSet([chr(97 + i) + "x" * 1023 for i in range(16)])
    steps = []
    step = stops_module._Automaton.step

    def counted(self: stops_module._Automaton, node: int, symbol: str) -> int:
        steps.append(symbol)
        return step(self, node, symbol)

    monkeypatch.setattr(stops_module._Automaton, "step", counted)
    text = "".join(random.Random(1).choices("abcdefghx", k=5_000))
    checker = StopChecker(ready)
    released = "".join(checker.push(char) for char in text)
    assert len(steps) <= len(text)
    assert released + checker.flush() == text


def test_a_fork_of_a_checker_goes_its_own_way() -> None:
    checker = StopChecker(StopSet(["ab", "<s>c"], ["<s>"]))
    assert checker.push("a") == ""
    other = checker.fork()
    other.push("b")
    assert other.match is not None
    assert checker.match is None
    assert checker.push("c") == "ac"


LIMITS = Limits("smollm2", 49152, (2,), 8192)


def test_what_is_resumed_is_taken_in_pieces(checkpoint) -> None:
    _, tokenizer, _ = checkpoint
    ids = [1000 + i % 500 for i in range(8000)]
    asked = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1]), stop=pb.Stop(stop=["zq"] * 16))
    asked.resume.add(token_ids=ids)
    checked = validated(asked, LIMITS)
    answer = Output(tokenizer, checked, [1], max_tokens=8100, min_tokens=0)
    assert answer.token_ids == []
    sizes = []
    for _ in answer.catch_up():
        sizes.append(len(answer.token_ids) - sum(sizes))
    assert answer.token_ids == ids
    assert max(sizes) <= 64
    assert (answer.num_resumed, answer.num_new) == (8000, 0)


async def test_the_event_loop_turns_while_choices_catch_up(checkpoint) -> None:
    """Between any two pieces, whatever the number of choices."""
    async with front(checkpoint) as f:
        f.answer[:] = [1000 + i % 500 for i in range(2003)]
        await f.worker()
        longest, last, done = 0.0, time.perf_counter(), asyncio.Event()

        async def watch() -> None:
            nonlocal longest, last
            while not done.is_set():
                await asyncio.sleep(0)
                now = time.perf_counter()
                longest, last = max(longest, now - last), now

        watching = asyncio.create_task(watch())
        fields = {"resume": [pb.Resume(index=i, token_ids=f.answer[:2000]) for i in range(16)]}
        stops = pb.Stop(stop=[f"{c}zzz" for c in "abcdefghijklmnop"], max_tokens=2003)
        call = f.call(stop=stops, n=16, timeout=60, **fields)
        responses = await collect(call)
        done.set()
        await watching
        assert sum(r.HasField("finished") for r in responses) == 16
        assert longest < 1.0


def large(**fields: object) -> dict[str, object]:
    bias = dict.fromkeys(range(2000, 4000), 1.0)
    return {"sampling": pb.Sampling(logit_bias=bias), "stop": stop(max_tokens=6), **fields}


async def test_large_parts_travel_once_a_request(checkpoint) -> None:
    async with front(checkpoint) as f:
        worker = await f.worker()
        responses = await collect(f.call(n=8, **large()))
        assert sum(r.HasField("finished") for r in responses) == 8
        assert (worker.num_carried, worker.num_unknown) == (1, 0)
        assert len(worker.requests) == 8
        assert sum(bool(r.sampling.logit_bias) for r in worker.requests) == 1
        assert len({r.shared_key for r in worker.requests}) == 1


async def test_small_requests_and_single_choices_share_nothing(checkpoint) -> None:
    async with front(checkpoint) as f:
        worker = await f.worker()
        await collect(f.call(n=3, stop=stop(max_tokens=6)))
        await collect(f.call(**large()))
        assert [r.shared_key for r in worker.requests] == [b""] * 4


async def test_another_worker_gets_the_parts_once_too(checkpoint) -> None:
    async with front(checkpoint) as f:
        first = await f.worker("d0", cues=[Cue(2, lost_error("gone")) for _ in range(8)])
        second = await f.worker("d1", cues=[Cue(2, lost_error("gone")) for _ in range(8)])
        responses = await collect(f.call(n=8, **large()))
        assert sum(r.HasField("finished") for r in responses) == 8
        assert first.num_carried <= 1
        assert second.num_carried <= 1
        assert first.num_carried + second.num_carried >= 1


async def test_a_worker_that_has_forgotten_gets_the_parts_again(checkpoint) -> None:
    async with front(checkpoint) as f:
        worker = await f.worker(pace_s=0.05)

        class Forgetful(dict):
            def get(self, key: bytes, default: object = None) -> object:
                found = super().pop(key, None)
                return found if worker.num_unknown else None

        worker.shared = Forgetful()
        responses = await collect(f.call(n=4, **large()))
        assert sum(r.HasField("finished") for r in responses) == 4
        assert worker.num_unknown >= 1
        assert 2 <= worker.num_carried <= 4


async def test_a_turn_passes_on_where_its_call_fails() -> None:
    parts = SharedParts(b"k")
    assert await parts.turn("i", 1)
    waiting = asyncio.create_task(parts.turn("i", 5))
    await asyncio.sleep(0)
    assert not waiting.done()
    parts.end_turn("i")
    assert await waiting  # nothing has arrived: the next call sends the parts
    with pytest.raises(DeadlineExceeded):
        await parts.turn("i", 0.01)
    parts.arrived("i")
    assert not await parts.turn("i", 1)
    assert await parts.turn("another", 1)


class _Call:
    """A stream whose only message comes in a thread, as gRPC's do."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self.is_cancelled = False

    async def read(self) -> str:
        loop = asyncio.get_running_loop()
        came: asyncio.Future[str] = loop.create_future()

        def send() -> None:
            loop.call_soon_threadsafe(loop.call_soon, came.set_result, "message")

        timer = threading.Timer(self._after_s, send)
        timer.start()
        try:
            return await came
        except asyncio.CancelledError:
            self.is_cancelled = True
            timer.cancel()
            raise


async def test_a_loop_that_was_held_up_reads_before_it_takes_a_peer_for_lost() -> None:
    call = _Call(0.2)
    reading = asyncio.create_task(next_message(call, "w", silence_s=0.5))
    await asyncio.sleep(0)
    time.sleep(1.5)  # noqa: ASYNC251
    assert await reading == "message"


async def test_a_peer_that_is_silent_is_lost_all_the_same() -> None:
    call = _Call(30)
    with pytest.raises(Silent):
        await next_message(call, "w", silence_s=0.2)
    assert call.is_cancelled
    reading = asyncio.create_task(next_message(_Call(30), "w", silence_s=0.2))
    await asyncio.sleep(0)
    time.sleep(1.0)  # noqa: ASYNC251
    with pytest.raises(Silent):
        await asyncio.wait_for(reading, 10)
