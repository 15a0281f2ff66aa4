"""The decisions of the client without a network, for any script of failures."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.client.attempts import RETRY_POLICY, Attempts, RetryPolicy
from coordinator.client.base import addresses_of, channel_options
from coordinator.client.blocking import Client
from coordinator.client.events import Done, TextDelta
from coordinator.client.messages import generate_request
from coordinator.client.stream import Stream
from engine.base.errors import DeadlineExceeded, DiptychError, Overloaded, Unavailable
from engine.pb.diptych.v1 import inference_pb2
from engine.rpc.status import internal, to_status
from tests.support.fake_coordinator import BARE, LOSSES, SAID, Cue, messages, whole

STEP_S = 0.01  # between two messages


class Lost(grpc.RpcError):
    """The end of a call in gRPC's form."""

    def __init__(self, how: str) -> None:
        said = SAID.get(how)
        if said is None:
            self._status = (BARE[how], "as scripted", ())
        else:
            status = to_status(said) if isinstance(said, DiptychError) else internal("a bug")
            self._status = (status.code, status.message, status.trailing_metadata)

    def code(self) -> grpc.StatusCode:
        return self._status[0]

    def details(self) -> str:
        return self._status[1]

    def trailing_metadata(self) -> Any:
        return self._status[2]


class Refused(Lost):
    """A call that a coordinator has ended with its own error."""

    def __init__(self, error: DiptychError) -> None:
        status = to_status(error)
        self._status = (status.code, status.message, status.trailing_metadata)


class Caller:
    """A reader of the stream: its events, calls and waits."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.now_s = 100.0
        self.tokens: list[int] = []
        self.text = ""
        self.done: Done | None = None
        self.error: Exception | None = None
        self.called: list[int] = []
        self.waits: list[float] = []
        self.requests: list[Any] = []

    def read(self, script: list[Cue], reply: Callable[[Any], Any]) -> None:
        """Read until the end or an error, over any number of calls, each with its script."""
        cues = iter(script)
        try:
            while not self.stream.done:
                call = self.stream.next(self.now_s)
                self.now_s += call.wait_s
                self.called.append(call.coordinator)
                self.waits.append(call.wait_s)
                self.requests.append(call.request)
                self._hear(call.request, next(cues, None), reply)
        except (DiptychError, Lost) as error:
            self.error = error

    def _hear(self, request: Any, cue: Cue | None, reply: Callable[[Any], Any]) -> None:
        left_s = self.stream.remaining_s(self.now_s)
        ends_s = math.inf if left_s is None else self.now_s + left_s
        for i, message in enumerate(reply(request)):
            if cue and i == cue.after:
                error = None if cue.how == "end" else Lost(cue.how)
                return self.stream.lost(error, self.now_s)
            self.now_s += STEP_S
            if self.now_s >= ends_s:
                raise DeadlineExceeded("as gRPC has it")
            event = self.stream.take(message)
            if isinstance(event, TextDelta):
                self.tokens += event.token_ids
                self.text += event.text
            elif event:
                self.done = event
                return None
        return None


def caller(num: int = 2, *, ends_s: float = math.inf, seed: int = 1, at: int = 0) -> Caller:
    retry_policy = RETRY_POLICY
    stream = Stream(
        generate_request("x", temperature=1.0),
        Attempts(num, at, retry_policy, random.Random(seed)),
        retry_policy,
        [f"c{i}" for i in range(num)],
        ends_s=ends_s,
    )
    return Caller(stream)


def answers(tokens: list[int], group: int = 2, tail: bool = False) -> Callable[[Any], Any]:
    return lambda request: messages(request, tokens, group, tail)


cues = st.builds(Cue, st.integers(0, 5), st.sampled_from([*LOSSES, *LOSSES, *SAID]))


@settings(max_examples=600)
@given(
    tokens=st.lists(st.integers(0, 49151), min_size=1, max_size=12),
    group=st.integers(1, 4),
    tail=st.booleans(),
    num=st.integers(1, 3),
    script=st.lists(cues, max_size=40),
    time_s=st.sampled_from([math.inf, 0.05, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_any_script_gives_the_output_or_an_error_with_the_delivered_tokens(
    tokens: list[int],
    group: int,
    tail: bool,
    num: int,
    script: list[Cue],
    time_s: float,
    seed: int,
) -> None:
    it = caller(num, ends_s=100.0 + time_s, seed=seed)
    it.read(script, answers(tokens, group, tail))
    assert it.tokens == tokens[: len(it.tokens)], "no token doubled, missing or different"
    assert whole(tokens).startswith(it.text)
    if it.done:
        assert (it.tokens, it.text) == (tokens, whole(tokens))
        assert it.done.num_resumed <= len(it.called) - 1
    elif isinstance(it.error, Unavailable):
        assert it.error.num_emitted == len(it.tokens)
    elif isinstance(it.error, Overloaded):
        assert not it.tokens
    else:
        last = script[len(it.called) - 1].how if len(it.called) <= len(script) else ""
        assert last in ("invalid", "missing", "bug") or it.now_s >= 100.0 + time_s
    (name,) = {r.request_id for r in it.requests}
    assert name, "one name, given by the client, so one seed"
    assert it.now_s <= 100.0 + time_s + STEP_S
    # Bounded: so many calls in the minute after each token, or after text without a token.
    assert len(it.called) <= (len(it.tokens) + 2) * num * 40


def test_a_broken_call_moves_at_once_with_the_delivered_tokens() -> None:
    it = caller(2)
    it.read([Cue(2, "cut")], answers([5, 6, 7, 8, 9]))
    assert it.called == [0, 1]
    assert it.waits == [0.0, 0.0]
    assert not it.requests[0].resume
    assert list(it.requests[1].resume[0].token_ids) == [5, 6, 7, 8]
    assert it.done
    assert it.done.num_resumed == 1


def test_the_next_call_names_the_worker_with_the_blocks() -> None:
    def reply(request: Any) -> list[Any]:
        found = list(messages(request, [5, 6, 7, 8, 9], 1, False))
        if not request.resume:
            found[0].delta.affinity_token, found[2].delta.affinity_token = (
                "d3",
                "d5",
            )  # lost in between
        return found

    it = caller(2)
    it.read([Cue(2, "cut"), Cue(1, "cut"), Cue(0, "cut")], reply)
    assert [[r.affinity_token for r in request.resume] for request in it.requests] == [
        [],
        *[["d3"]] * 3,
    ]
    it = caller(2)
    it.read([Cue(3, "cut")], reply)
    assert it.requests[1].resume[0].affinity_token == "d5"


def test_one_coordinator_is_retried_with_backoff() -> None:
    it = caller(1)
    it.read([Cue(1, "cut"), *[Cue(0, "cut")] * 99], answers([5, 6, 7]))
    assert isinstance(it.error, Unavailable)
    assert it.error.num_emitted == 2
    assert "broke off after 2 tokens" in it.error.message
    wanted = [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0, 5.0]
    for wait_s, most_s in zip(it.waits[1:], wanted, strict=False):
        assert most_s / 2 <= wait_s <= most_s
    assert 59.0 < sum(it.waits) <= 60.0, "the minute that is documented, and all of it"


def test_a_token_resets_the_backoff() -> None:
    it = caller(1)
    it.read([Cue(1, "cut")] * 30, answers(list(range(50)), group=2))
    assert it.done
    assert it.done.num_resumed == 25
    assert max(it.waits) <= RETRY_POLICY.backoff_s


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.parametrize("time_s", [math.inf, 300.0, 10.0, 1.0])
def test_all_unreachable_before_the_first_token(num: int, time_s: float) -> None:
    it = caller(num, ends_s=100.0 + time_s)
    it.read([Cue(0, "cut")] * 500, answers([5]))
    assert isinstance(it.error, Unavailable)
    assert it.error.num_emitted == 0
    assert it.called[:3] == [0, 1, 2][:num] or num == 1
    ends_s = min(time_s, 60.0)
    assert ends_s - 1.0 < sum(it.waits) < ends_s, "near to its end, and never behind it"
    assert len(it.called) < 35 * num


@pytest.mark.parametrize("how", ["overloaded", "unavailable"])
def test_one_refuses_and_the_other_is_unreachable(how: str) -> None:
    """The unreachable one is retried meanwhile, for the whole minute."""
    it = caller(2)
    for _ in range(500):
        try:
            at, _ = plan(it)
        except (Overloaded, Unavailable) as error:
            assert "full" in error.message or "draining" in error.message
            break
        said = Overloaded("full", 20.0) if how == "overloaded" else Unavailable("draining", 20.0)
        it.called.append(at)
        it.stream.lost(Lost("cut") if at else Told(said), it.now_s)
    assert 157.0 < it.now_s < 160.0
    assert it.called.count(0) == 3
    assert it.called.count(1) > 10


def test_silence_is_loss_and_doubles_the_limit() -> None:
    it = caller(2)
    limits = []
    for _ in range(9):
        call = it.stream.next(it.now_s)
        assert call.request.alive
        limits.append((call.coordinator, call.silence_s))
        it.now_s += call.wait_s + 0.01
        it.stream.silent(it.now_s)
    assert limits[:4] == [(0, 2.5), (1, 2.5), (0, 5.0), (1, 5.0)]
    assert max(limit for _, limit in limits) == 20.0
    call = it.stream.next(it.now_s)
    (first, *_) = messages(call.request, [5, 6, 7])
    assert it.stream.take(first)
    it.stream.silent(it.now_s)
    assert it.stream.next(it.now_s).silence_s == 20.0, "it has moved, and was silent again"


def test_a_slow_coordinator_is_not_called_again_between_its_tokens() -> None:
    """It pauses for 6 s after each token: two further calls, not one each time."""
    it = caller(1)
    call, tokens, num_calls = it.stream.next(it.now_s), list(range(40)), 1
    for num in range(1, 40):
        if call.silence_s < 6.0:
            it.now_s += call.silence_s
            it.stream.silent(it.now_s)
            call, num_calls = it.stream.next(it.now_s), num_calls + 1
            arriving = messages(call.request, tokens, group=1)
        elif num == 1:
            arriving = messages(call.request, tokens, group=1)
        assert it.stream.take(next(arriving))
    assert num_calls == 3


def test_a_stuck_coordinator_is_retried_for_a_minute() -> None:
    it = caller(1)
    with pytest.raises(Unavailable, match="no message for"):
        while True:
            call = it.stream.next(it.now_s)
            it.now_s += call.wait_s + call.silence_s
            it.stream.silent(it.now_s)
    assert 160.0 < it.now_s < 185.0


def test_alive_and_unknown_events_are_neither_progress_nor_an_end() -> None:
    it = caller(2)
    call = it.stream.next(it.now_s)
    (first, *_) = messages(call.request, [5, 6, 7])
    it.stream.take(first)
    it.stream.lost(Lost("cut"), it.now_s)
    call = it.stream.next(it.now_s)
    alive = inference_pb2.GenerateResponse(alive=inference_pb2.Alive())
    unknown = inference_pb2.GenerateResponse.FromString(b"\xaa\x06\x00")  # field 101, a message
    for _ in range(3):
        assert it.stream.take(alive) is it.stream.take(unknown) is None
    it.stream.lost(Lost("cut"), it.now_s)
    assert it.stream.next(it.now_s).wait_s > 0, "both were lost since it moved"
    assert not it.stream.done


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_silence_s_must_be_positive(bad: float) -> None:
    with pytest.raises(ValueError, match="silence_s: expected"):
        RetryPolicy(silence_s=bad)


def test_without_silence_s_no_alive_is_requested() -> None:
    client = Client("a:1", retry_policy=RetryPolicy(silence_s=math.inf))
    stream = client._stream(generate_request("x"), None)
    call = stream.next(0.0)
    assert not call.request.alive
    assert math.isinf(call.silence_s)


@pytest.mark.parametrize("how", ["invalid", "missing", "bug"])
@pytest.mark.parametrize("after", [0, 2])
def test_a_final_error_is_raised_without_another_call(how: str, after: int) -> None:
    it = caller(2)
    it.read([Cue(after, how)], answers([5, 6, 7, 8, 9]))
    assert len(it.called) == 1
    if how == "bug":
        assert isinstance(it.error, Lost)
    else:
        assert type(it.error) is type(SAID[how])


class Told(Lost):
    """UNAVAILABLE or RESOURCE_EXHAUSTED, with a retry time."""

    def __init__(self, error: DiptychError) -> None:
        status = to_status(error)
        self._status = (status.code, status.message, status.trailing_metadata)


def plan(it: Caller) -> tuple[int, float]:
    call = it.stream.next(it.now_s)
    it.now_s += call.wait_s
    return call.coordinator, call.wait_s


def test_a_retry_time_is_respected_and_others_are_called_first() -> None:
    it = caller(3)
    assert plan(it) == (0, 0.0)
    it.stream.lost(Told(Unavailable("draining", 7.0)), it.now_s)
    assert plan(it) == (1, 0.0)
    it.stream.lost(Told(Overloaded("full", 20.0)), it.now_s)
    assert plan(it) == (2, 0.0)
    it.stream.lost(Lost("cut"), it.now_s)
    at, wait_s = plan(it)
    assert at == 2
    assert wait_s <= 0.2
    it.stream.lost(Told(Unavailable("draining", 30.0)), it.now_s)
    at, wait_s = plan(it)
    assert at == 0
    assert it.now_s >= 107.0
    it.stream.lost(Lost("cut"), it.now_s)
    assert plan(it)[0] == 0  # soon, the others only in many seconds
    it.stream.lost(Told(Unavailable("draining", 55.0)), it.now_s)
    at, _ = plan(it)
    assert at == 1
    assert it.now_s >= 120.0


def test_no_wait_exceeds_a_minute_or_timeout_s() -> None:
    for retry_s, time_s in ((3600.0, math.inf), (5.0, 3.0)):
        it = caller(1, ends_s=100.0 + time_s)
        plan(it)
        it.stream.lost(Told(Unavailable("draining", retry_s)), it.now_s)
        with pytest.raises(Unavailable, match="draining") as caught:
            plan(it)
        assert caught.value.retry_after_s == retry_s
        assert it.now_s == 100.0, "the error comes at once"


def test_overloaded_everywhere_is_overloaded_and_after_a_token_unavailable() -> None:
    it = caller(2)
    it.read([Cue(0, "overloaded")] * 99, answers([5, 6, 7]))
    assert isinstance(it.error, Overloaded)
    it = caller(2)
    it.read([Cue(1, "cut"), *[Cue(0, "overloaded")] * 99], answers([5, 6, 7]))
    assert isinstance(it.error, Unavailable)
    assert it.error.num_emitted == 2


def test_a_coordinators_error_has_precedence_over_a_dead_connection() -> None:
    it = caller(2)
    it.read([Cue(0, "cut"), Cue(0, "overloaded")] * 50, answers([5]))
    assert isinstance(it.error, Overloaded)


def test_a_lost_end_is_requested_again_and_its_text_delivered_once() -> None:
    for tail in (False, True):
        it = caller(2)
        it.read([Cue(2 + tail, "cut"), Cue(tail, "end")], answers([5, 6, 7, 8], tail=tail))
        assert (it.tokens, it.text) == ([5, 6, 7, 8], whole([5, 6, 7, 8]))
        assert len(it.called) == 3
        assert it.done


def test_a_call_that_fails_before_its_first_message_resumed_nothing() -> None:
    it = caller(3)
    it.read([Cue(1, "cut"), Cue(0, "cut")], answers([5, 6, 7]))
    assert it.done
    assert it.done.num_resumed == 1


def test_grpcs_own_resource_exhausted_is_final() -> None:
    """A message too long for this client is too long from any coordinator."""
    it = caller(2)
    plan(it)
    error = Lost("cut")
    error._status = (grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max", ())
    with pytest.raises(Overloaded, match="larger"):
        it.stream.lost(error, it.now_s)


def test_addresses() -> None:
    assert addresses_of("a:1") == ("a:1",)
    assert addresses_of("a:1, b:2,a:1") == ("a:1", "b:2")
    assert addresses_of(["a:1", "b:2,c:3"]) == ("a:1", "b:2", "c:3")
    for bad in ("", "a:1,,b:2", [], ["a:1", ""]):
        with pytest.raises(ValueError, match="HOST:PORT"):
            addresses_of(bad)


def test_grpc_does_not_retry() -> None:
    options = dict(channel_options(RetryPolicy()))
    assert "retryPolicy" not in str(options["grpc.service_config"])
    assert options["grpc.keepalive_time_ms"] == options["grpc.keepalive_timeout_ms"] == 3000


@pytest.mark.parametrize(("worker_wait_s", "gives_up_s"), [(20.0, 80.0), (70.0, 70.0)])
def test_waiting_in_vain_for_a_worker_ends_with_the_minute(
    worker_wait_s: float, gives_up_s: float
) -> None:
    """Each call waits at the coordinator; no call begins after the minute."""
    now_s, num_calls = 100.0, 0
    client = Client("a:1", clock=lambda: now_s, rng=random.Random(3))
    stream = client._stream(generate_request("x"), None)
    with pytest.raises(Unavailable, match="no decode worker is ready"):
        while True:
            now_s += stream.next(now_s).wait_s
            num_calls += 1
            assert now_s - 100.0 < 60.0
            now_s += worker_wait_s
            stream.lost(Refused(Unavailable("no decode worker is ready", 5.0)), now_s)
    assert worker_wait_s <= now_s - 100.0 <= gives_up_s
    assert num_calls == (3 if worker_wait_s == 20.0 else 1)
