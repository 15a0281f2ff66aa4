"""Several choices of one output: wherever its calls are lost, the events are the same."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.client.attempts import RETRY_POLICY, Attempts
from coordinator.client.events import Done, OutputEvent, Prompt, TextDelta
from coordinator.client.messages import generate_request
from coordinator.client.stream import Stream
from engine.base.errors import Unavailable
from engine.pb.diptych.v1 import inference_pb2
from tests.support.fake_coordinator import of_choice, whole

PROMPT = inference_pb2.Prompt(text="Once", token_ids=[1, 2])


@dataclass(frozen=True)
class Script:
    """The messages of a coordinator: odd choices are tool calls, even ones text.

    The text of a choice is one token late; with `tail` the rest comes without a token.
    """

    tokens: Sequence[int]
    n: int = 1
    tail: bool = False
    prompt: bool = False
    group: int | None = 1  # tokens a message; None: random
    in_turns: bool = True  # else in random order

    def request(self) -> Any:
        return generate_request("x", n=self.n, temperature=1.0, echo=self.prompt, logprobs=0)

    def reply(self, request: Any, rng: random.Random) -> Iterator[inference_pb2.GenerateResponse]:
        resumes = {resume.index: resume for resume in request.resume}
        assert len(resumes) == len(request.resume)
        if self.prompt and not any(r.token_ids or r.finished for r in request.resume):
            yield inference_pb2.GenerateResponse(request_id="r", prompt=PROMPT)
        open_ = [self._choice(i, resumes.get(i), rng) for i in range(self.n)]
        while open_:
            choice = open_.pop(0 if self.in_turns else rng.randrange(len(open_)))
            if (message := next(choice, None)) is not None:
                yield message
                open_.append(choice)

    def _choice(
        self, index: int, resume: Any, rng: random.Random
    ) -> Iterator[inference_pb2.GenerateResponse]:
        tokens = of_choice(self.tokens, index)
        have = list(resume.token_ids) if resume else []
        assert have == tokens[: len(have)], f"{have} is not what was sent"
        num = len(have)
        while num < len(tokens):
            upto = min(num + (self.group or rng.randint(1, 4)), len(tokens))
            logprobs = [
                inference_pb2.TokenLogprobs(chosen=inference_pb2.Logprob(token_id=t))
                for t in tokens[num:upto]
            ]
            delta = self._delta(index, self._shown(tokens, num), self._shown(tokens, upto))
            delta.token_ids.extend(tokens[num:upto])
            delta.logprobs.extend(logprobs)
            yield inference_pb2.GenerateResponse(index=index, delta=delta)
            num = upto
        if self.tail and not (resume and resume.finished):
            delta = self._delta(index, self._shown(tokens, num), whole(tokens))
            yield inference_pb2.GenerateResponse(index=index, delta=delta)
        usage = inference_pb2.Usage(completion_tokens=len(tokens))
        finished = inference_pb2.Finished(
            finish_reason=inference_pb2.FINISH_REASON_STOP,
            matched_stop=inference_pb2.MatchedStop(token_id=tokens[-1]),
            usage=usage,
        )
        yield inference_pb2.GenerateResponse(request_id="r", index=index, finished=finished)

    def _shown(self, tokens: Sequence[int], num: int) -> str:
        return whole(tokens if num == len(tokens) and not self.tail else tokens[: max(0, num - 1)])

    def _delta(self, index: int, before: str, after: str) -> inference_pb2.Delta:
        new = after[len(before) :]
        if index % 2 == 0 or not new:
            return inference_pb2.Delta(text=new)
        begin = {"id": f"call-{index}", "name": "look"} if not before else {}
        piece = inference_pb2.ToolCallDelta(index=0, arguments=new, **begin)
        return inference_pb2.Delta(tool_calls=[piece])


def stream_of(script: Script) -> Stream:
    rng = random.Random(1)
    attempts = Attempts(2, 0, RETRY_POLICY, rng)
    return Stream(script.request(), attempts, RETRY_POLICY, ["a", "b"])


def heard(script: Script, cuts: Sequence[int], seed: int = 1) -> list[OutputEvent]:
    """All events, where call i is lost after cuts[i] messages, and later calls are not."""
    rng, stream, events, now_s = random.Random(seed), stream_of(script), [], 0.0
    for cut in [*cuts, None]:
        call = stream.next(now_s)
        now_s += call.wait_s
        for i, message in enumerate(script.reply(call.request, rng)):
            if i == cut:
                break
            if event := stream.take(message):
                events.append(event)
            if stream.done:
                return events
        stream.lost(None, now_s)
    raise AssertionError("the last call was to go well")


def of(events: list[OutputEvent], index: int) -> list[TextDelta | Done]:
    return [e for e in events if not isinstance(e, Prompt) and e.index == index]


def check(script: Script, events: list[OutputEvent]) -> None:
    """Each choice and the prompt are complete, and delivered once."""
    assert [e for e in events if isinstance(e, Prompt)] == [PROMPT] * script.prompt
    if script.prompt:
        assert isinstance(events[0], Prompt)
    for index in range(script.n):
        *deltas, end = of(events, index)
        tokens = of_choice(script.tokens, index)
        assert isinstance(end, Done)
        assert all(isinstance(delta, TextDelta) for delta in deltas)
        assert [t for d in deltas for t in d.token_ids] == tokens
        assert [p.chosen.token_id for d in deltas for p in d.logprobs] == tokens
        pieces = [piece for d in deltas for piece in d.tool_calls]
        text = "".join(d.text for d in deltas)
        arguments = "".join(piece.arguments for piece in pieces)
        assert (arguments, text)[:: 1 if index % 2 else -1] == (whole(tokens), "")
        if index % 2:
            assert "".join(piece.id for piece in pieces) == pieces[0].id == f"call-{index}"
            assert "".join(piece.name for piece in pieces) == pieces[0].name == "look"
        assert (end.finish_reason, end.matched_stop) == ("stop", tokens[-1])
        assert end.usage.completion_tokens == len(tokens)


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_cut_at_every_message_and_again_at_every_message(n: int, prompt: bool, tail: bool) -> None:
    script = Script(range(100, 105), n, tail, prompt)
    undisturbed = heard(script, [])
    check(script, undisturbed)
    num = len(list(script.reply(script.request(), random.Random(1))))
    for first in range(num):
        for cuts in ([first], *([first, second] for second in range(num))):
            events = heard(script, cuts)
            for index in range(n):
                again = [e if isinstance(e, TextDelta) else e.usage for e in of(events, index)]
                before = [
                    e if isinstance(e, TextDelta) else e.usage for e in of(undisturbed, index)
                ]
                assert again == before, cuts
            check(script, events)


@settings(max_examples=300)
@given(
    tokens=st.lists(st.integers(0, 49151), min_size=1, max_size=9),
    n=st.integers(1, 5),
    tail=st.booleans(),
    prompt=st.booleans(),
    cuts=st.lists(st.integers(0, 30), max_size=8),
    seed=st.integers(0, 10**6),
)
def test_in_any_order_and_grouping(
    tokens: list[int], n: int, tail: bool, prompt: bool, cuts: list[int], seed: int
) -> None:
    script = Script(tokens, n, tail, prompt, group=None, in_turns=False)
    check(script, heard(script, cuts, seed))


def test_the_next_call_gets_what_it_needs_of_each_choice() -> None:
    script = Script(range(100, 103), n=4)
    stream = stream_of(script)
    first = stream.next(0.0).request
    assert not first.resume
    for message in script.reply(first, random.Random(1)):
        if message.index in (0, 3) or (message.index == 2 and len(stream._choices) < 3):
            stream.take(message)
    assert not stream.done
    stream.lost(None, 0.0)
    second = stream.next(0.0).request
    told = {r.index: (list(r.token_ids), r.finished) for r in second.resume}
    assert told == {0: ([100, 101, 102], True), 2: ([102], False), 3: ([103], True)}
    assert second.n == 4
    assert second.request_id == first.request_id
    assert stream.interrupted("gone").num_emitted == 5


def test_the_end_of_one_choice_is_not_the_end_of_the_output() -> None:
    """A stream that ends without error is lost while a choice is open."""
    script = Script([7], n=2)
    stream = stream_of(script)
    messages = list(script.reply(stream.next(0.0).request, random.Random(1)))
    for message in messages[:-1]:
        stream.take(message)
    assert messages[-1].HasField("finished")
    assert not stream.done
    stream.lost(None, 0.0)
    for message in script.reply(stream.next(0.0).request, random.Random(1)):
        event = stream.take(message)
    assert isinstance(event, Done)
    assert (event.index, event.num_resumed) == (1, 1)
    assert stream.done


def test_a_prompt_begins_the_output_and_is_delivered_once() -> None:
    script = Script([7, 8], prompt=True)
    stream = stream_of(script)
    (first, *_) = script.reply(stream.next(0.0).request, random.Random(1))
    assert stream.take(first) == PROMPT
    stream.lost(None, 0.0)
    call = stream.next(0.0)
    assert not call.request.resume
    (again, *rest) = script.reply(call.request, random.Random(1))
    assert again.HasField("prompt")
    assert stream.take(again) is None
    assert isinstance(stream.take(rest[0]), TextDelta)
    now_s = 0.0
    for _ in range(99):
        stream.lost(None, now_s)
        try:
            now_s += stream.next(now_s).wait_s
        except Unavailable as error:
            assert error.num_emitted == 1
            return
    raise AssertionError("it is bounded")
