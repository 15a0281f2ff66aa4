"""Real outputs of a coordinator, lost at every message: the client's events do not change.

In test_choices.py the coordinator is scripted; here it is real, with stops, grammars, tool
parsers and log-probabilities. Only the decode worker is scripted.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest

from coordinator.client import Done, Prompt, TextDelta, chat_request, generate_request
from coordinator.client.attempts import RETRY_POLICY, Attempts
from coordinator.client.stream import Stream
from engine.base.seeds import choice_seed
from engine.pb.diptych.v1 import inference_pb2
from tests.support.constrained_front import SCHEMA, TEXT, front
from tests.support.grpc_front import PROMPT

SEED = 7
STORIES = (
    "The river was wide and slow, and few knew where it began.",
    "“Wait” — 雪が降る。 🙂 It snows on, and on.",
    "No one had ever asked him such a thing before, and he said so at once.",
)
OBJECTS = (TEXT, '{"name": "雪 🙂", "age": 12}', '{"name": "", "age": 1}')
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'
CALLS = (
    CALL.removesuffix("\n</tool_call>") % "Paris",
    "\n".join((CALL % "Oslo", CALL % "雪 🙂")),
    "It rains. <tool",
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
TURNS = [{"role": "user", "content": "How is the weather?"}]
COMMON = {"request_id": "seam", "n": 3, "seed": SEED, "temperature": 1.0}


def plain(full: int) -> Any:
    return generate_request(
        PROMPT, stop=["such a thing"], logprobs=2, prompt_logprobs=1, echo=True, **COMMON
    )


def held(full: int) -> Any:
    """The worker ends the output: the text that a stop string held back has no token."""
    return generate_request(PROMPT, json_schema=SCHEMA, max_tokens=full, stop=["}}"], **COMMON)


def tools(full: int) -> Any:
    """One ends without its end marker, one within a possible call: then a call and a text have no
    token. One is cut off within its call.
    """
    return chat_request(TURNS, tools=[WEATHER], stop=["snow"], max_tokens=full, **COMMON)


def stream_of(request: Any) -> Stream:
    attempts = Attempts(1, 0, RETRY_POLICY, random.Random(1))
    return Stream(request, attempts, RETRY_POLICY, ["a"])


async def heard(stub: Any, request: Any, cuts: list[int]) -> tuple[list[Any], int]:
    """(events, messages of the first call), where call i is lost after cuts[i] messages."""
    stream, events, num = stream_of(request), [], 0
    for cut in [*cuts, -1]:
        plan = stream.next(0.0)
        call = getattr(stub, stream.method)(plan.request, timeout=10)
        at = 0
        async for message in call:
            if at == cut:
                break
            at += 1
            if event := stream.take(message):
                events.append(event)
            if stream.done:
                break
        call.cancel()
        num = num or at
        if stream.done:
            return events, num
        stream.lost(None, 0.0)
    raise AssertionError("the last call was to go well")


def told(events: list[Any], n: int) -> list[list[Any]]:
    """The prompt, then the content of each choice, without timings."""
    nothing = inference_pb2.Timing()
    by_index: list[list[Any]] = [[e for e in events if isinstance(e, Prompt)]]
    for index in range(n):
        mine = [e for e in events if not isinstance(e, Prompt) and e.index == index]
        assert isinstance(mine[-1], Done)
        assert all(isinstance(e, TextDelta) for e in mine[:-1])
        usage = inference_pb2.Usage(completion_tokens=mine[-1].usage.completion_tokens)
        end = replace(mine[-1], usage=usage, timing=nothing, num_resumed=0)
        by_index.append([*mine[:-1], end])
    return by_index


@pytest.mark.parametrize("group", [1, 7])
@pytest.mark.parametrize(
    ("ask", "texts", "by_itself"),
    [(plain, STORIES, False), (held, OBJECTS, True), (held, OBJECTS, False), (tools, CALLS, True)],
    ids=["plain", "held", "stop-token", "tools"],
)
async def test_no_seam_wherever_it_is_cut(
    checkpoint: Any,
    ask: Any,
    texts: tuple[str, ...],
    by_itself: bool,
    group: int,
) -> None:
    async with front(checkpoint) as f:
        encode = f.coordinator.model.tokenizer.encode
        eos = [] if by_itself else [checkpoint[0].config.eos_token_ids[0]]
        answers = [encode(text) + eos for text in texts]
        scripted = {choice_seed(SEED, i): answer for i, answer in enumerate(answers)}
        await f.worker(by_seed=scripted, group=group, ends_by_itself=by_itself)
        request = ask(len(answers[0]) if by_itself else 100)
        events, num = await heard(f.stub, request, [])
        undisturbed = told(events, 3)
        if by_itself:
            assert any(isinstance(e, TextDelta) and not e.token_ids for e in events)
        for first in range(num):
            for cuts in ([first], [first, 1]):
                again, _ = await heard(f.stub, request, cuts)
                assert told(again, 3) == undisturbed, cuts
        await asyncio.wait_for(f.coordinator.pipeline.idle.wait(), 5)
