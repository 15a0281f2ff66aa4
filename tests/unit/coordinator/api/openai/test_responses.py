"""Events -> responses of both APIs: a whole response is the folded stream."""

from __future__ import annotations

import json
import math

import pytest

from coordinator.api.openai.chat_responses import ChatWriter
from coordinator.api.openai.completion_responses import CompletionWriter
from coordinator.api.openai.requests import read_chat, read_completion
from coordinator.generation.events import Delta, PromptEvent
from coordinator.text.values import Logprob, ScoredToken, ToolCallPiece
from engine.base.types import FinishReason
from tests.support.answer_events import finished, scored, usage

HEAD = {"model": "m", "created": 7}
LENGTH = FinishReason.LENGTH


def delta(index=0, **fields):
    return Delta(index, **fields)


def completion_writer(prompt_ids=None, **body):
    call = read_completion({"prompt": "x", **body}, "id")
    return CompletionWriter(call=call, prompt_ids=prompt_ids, **HEAD)


def chat_writer(prompt_ids=None, **body):
    call = read_chat({"messages": [{"role": "user", "content": "x"}], **body}, "id")
    return ChatWriter(call=call, prompt_ids=prompt_ids, **HEAD)


def feed(writer, *responses, first_text=""):
    """(every choice of the stream, the whole response); an event may be (prompt, event)."""
    parts, whole = [], {}
    for item in responses:
        index, response = item if isinstance(item, tuple) else (0, item)
        for part in writer.choices(index, response, first_text):
            parts.append(json.loads(json.dumps(part)))
            whole[part["index"]] = writer.fold(whole.get(part["index"]), part)
    return parts, writer.whole(whole)


def test_a_completion():
    parts, whole = feed(
        completion_writer(),
        delta(text="ab", token_ids=[1]),
        delta(text="", token_ids=[2]),
        finished(),
    )
    plain = {"index": 0, "logprobs": None}
    assert parts == [
        {**plain, "text": "ab", "finish_reason": None},
        {**plain, "text": "", "finish_reason": None},
        {**plain, "text": "", "finish_reason": "stop", "stop_reason": None},
    ]
    assert whole == {
        "id": "cmpl-id",
        "object": "text_completion",
        "created": 7,
        "model": "m",
        "choices": [{**plain, "text": "ab", "finish_reason": "stop", "stop_reason": None}],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 2,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


def test_reasons():
    def of(**fields):
        writer = completion_writer(stop_token_ids=[0, 9])
        _, whole = feed(writer, delta(text="x"), finished(**fields))
        choice = whole["choices"][0]
        return choice["finish_reason"], choice["stop_reason"]

    assert of(reason=LENGTH) == ("length", None)
    assert of(text="END") == ("stop", "END")
    assert of() == ("stop", None)  # a constraint was complete
    assert of(token=9) == ("stop", 9)
    assert of(token=0) == ("stop", 0)
    assert of(token=2) == ("stop", None)  # end of sequence
    assert of(reason=FinishReason.ABORTED) == ("abort", None)


def test_choices_are_numbered_over_prompts_and_usage_counts_a_prompt_once():
    writer = completion_writer(prompt=["x", "y"], n=2)
    longer = usage(10, 3, 8)
    found = usage(4, 2, 4)
    _, whole = feed(
        writer,
        (1, delta(index=1, text="y1", token_ids=[1])),
        (0, delta(index=0, text="x0", token_ids=[1])),
        (1, delta(index=0, text="y0", token_ids=[1])),
        (0, delta(index=1, text="x1", token_ids=[1])),
        (0, finished(index=0)),
        (0, finished(index=1, used=found)),
        (1, finished(index=1, used=longer)),
        (1, finished(index=0, used=longer)),
    )
    assert [(c["index"], c["text"]) for c in whole["choices"]] == [
        (0, "x0"),
        (1, "x1"),
        (2, "y0"),
        (3, "y1"),
    ]
    assert whole["usage"]["prompt_tokens"] == 14
    assert whole["usage"]["completion_tokens"] == 2 + 2 + 3 + 3
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 1 + 8}


ENTRIES = [
    scored(5, " a", -0.5, (5, " a", -0.5), (6, " b", -1.5)),
    scored(7, "c", -3.0, (8, "d", -0.25), (9, "c", -2.0), at=2),
]


def test_logprobs_of_completions():
    parts, whole = feed(
        completion_writer(logprobs=2),
        delta(text=" a", token_ids=[5], logprobs=ENTRIES[:1]),
        delta(text="c", token_ids=[7], logprobs=ENTRIES[1:]),
        finished(),
    )
    assert whole["choices"][0]["logprobs"] == {
        "tokens": [" a", "c"],
        "token_logprobs": [-0.5, -3.0],
        # Two tokens with one text: the value of the likelier one.
        "top_logprobs": [{" a": -0.5, " b": -1.5}, {"d": -0.25, "c": -2.0}],
        "text_offset": [0, 2],
    }
    assert parts[1]["logprobs"]["text_offset"] == [2]  # continues through the stream
    assert parts[2]["logprobs"] is None


def test_infinities_and_nan():
    worst = scored(1, "x", -math.inf, (2, "y", math.nan))
    _, whole = feed(completion_writer(logprobs=1), delta(text="x", logprobs=[worst]), finished())
    assert whole["choices"][0]["logprobs"]["top_logprobs"] == [{"x": -9999.0, "y": -9999.0}]


def broken(token_id, raw, value=-1.0):
    chosen = Logprob(token_id, value, "\ufffd", raw)
    return ScoredToken(chosen, [chosen])


def test_tokens_that_make_a_character_together():
    made = [broken(1, b" \xf0\x9f"), broken(2, b"\x98"), broken(3, b"\x80"), scored(4, "é", -1.0)]
    _, whole = feed(
        chat_writer(logprobs=True, top_logprobs=1),
        delta(logprobs=made[:2]),
        delta(text=" \U0001f600é", logprobs=made[2:]),
        finished(),
    )
    tokens = whole["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode() == " \U0001f600é"
    assert tokens[1]["top_logprobs"][0]["bytes"] == [0x98]


def test_tokens_by_id():
    _, whole = feed(
        completion_writer(logprobs=1, return_tokens_as_token_ids=True),
        delta(text=" a", logprobs=ENTRIES[:1]),
        finished(),
    )
    logprobs = whole["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:5"]
    assert logprobs["top_logprobs"] == [{"token_id:5": -0.5, "token_id:6": -1.5}]


ECHOED_ENTRY = scored(5, " a", -0.5, (5, " a", -0.5), (6, " b", -1.5), at=4)
ECHOED = PromptEvent(text="Once a", token_ids=[3, 5], logprobs=[ECHOED_ENTRY])


@pytest.mark.parametrize("n", [1, 2])
def test_an_echoed_prompt_begins_every_choice(n):
    writer = completion_writer(echo=True, logprobs=2, n=n)
    made = [scored(7, "c", -3.0)]  # at the start of the answer
    responses = [delta(index=i, text="c", token_ids=[7], logprobs=made) for i in range(n)]
    responses += [finished(index=i) for i in range(n)]
    parts, whole = feed(writer, ECHOED, *responses, first_text="Once")
    assert len(whole["choices"]) == n
    for choice in whole["choices"]:
        assert choice["text"] == "Once ac"
        assert choice["logprobs"] == {
            "tokens": ["Once", " a", "c"],
            "token_logprobs": [None, -0.5, -3.0],
            "top_logprobs": [None, {" a": -0.5, " b": -1.5}, {"c": -3.0}],
            "text_offset": [0, 4, 6],
        }
    assert [part["index"] for part in parts[:n]] == list(range(n))


def test_echo_alone_and_of_nothing_more():
    length = finished(reason=LENGTH, used=usage(2))
    _, whole = feed(completion_writer(echo=True, max_tokens=0), ECHOED, length)
    assert whole["choices"][0]["text"] == "Once a"
    assert whole["choices"][0]["logprobs"] is None
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_as_vllm_writes_them():
    expected = [
        None,
        {
            "5": {"logprob": -0.5, "rank": 1, "decoded_token": " a"},
            "6": {"logprob": -1.5, "rank": 2, "decoded_token": " b"},
        },
    ]
    responses = (ECHOED, delta(text="c", token_ids=[7]), finished())
    _, whole = feed(completion_writer(prompt_logprobs=2), *responses)
    assert whole["choices"][0]["prompt_logprobs"] == expected
    assert whole["choices"][0]["text"] == "c"
    _, whole = feed(chat_writer(prompt_logprobs=2), *responses)
    assert whole["prompt_logprobs"] == expected


def test_token_ids():
    writer = completion_writer(
        prompt=["x", [1, 2]], return_token_ids=True, prompt_ids=[[3], [1, 2]]
    )
    parts, whole = feed(
        writer,
        delta(text="a", token_ids=[5]),
        (1, delta(text="b", token_ids=[6, 7])),
        delta(text="c", token_ids=[8]),
        finished(),
        (1, finished()),
    )
    assert [part.get("prompt_token_ids") for part in parts] == [[3], [1, 2], None, None, None]
    assert [c["token_ids"] for c in whole["choices"]] == [[5, 8], [6, 7]]
    assert whole["choices"][1]["prompt_token_ids"] == [1, 2]


def test_a_chat():
    parts, whole = feed(
        chat_writer(),
        delta(text="Hi", token_ids=[1]),
        delta(text="", token_ids=[2]),
        finished(),
    )
    plain = {"index": 0, "logprobs": None, "finish_reason": None}
    assert parts == [
        {**plain, "delta": {"role": "assistant", "content": ""}},
        {**plain, "delta": {"content": "Hi"}},
        {**plain, "delta": {"content": ""}},
        {**plain, "delta": {}, "finish_reason": "stop", "stop_reason": None},
    ]
    assert whole["object"] == "chat.completion"
    (choice,) = whole["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hi", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_an_empty_output_has_a_role():
    parts, whole = feed(chat_writer(), finished())
    assert parts[0]["delta"]["role"] == "assistant"
    assert whole["choices"][0]["message"]["content"] == ""


def test_logprobs_of_chat():
    _, whole = feed(
        chat_writer(logprobs=True, top_logprobs=2),
        delta(text=" a", token_ids=[5], logprobs=ENTRIES[:1]),
        delta(text="c", token_ids=[7], logprobs=ENTRIES[1:]),
        finished(),
    )
    content = whole["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in content] == [" a", "c"]
    assert content[0] == {
        "token": " a",
        "logprob": -0.5,
        "bytes": [32, 97],
        "top_logprobs": [
            {"token": " a", "logprob": -0.5, "bytes": [32, 97]},
            {"token": " b", "logprob": -1.5, "bytes": [32, 98]},
        ],
    }


TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]


def call(index, arguments, **first):
    return ToolCallPiece(index, first.get("id", ""), first.get("name", ""), arguments)


def test_tool_calls():
    parts, whole = feed(
        chat_writer(tools=TOOLS),
        delta(token_ids=[1]),  # held back: it adds nothing
        delta(token_ids=[2], tool_calls=[call(0, "{}", id="c0", name="f")]),
        delta(token_ids=[3], tool_calls=[call(1, '{"a":1}', id="c1", name="g")]),
        finished(),
    )
    calls = [
        {"id": "c0", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "c1", "type": "function", "function": {"name": "g", "arguments": '{"a":1}'}},
    ]
    assert [part["delta"] for part in parts] == [
        {"role": "assistant", "content": ""},
        {"tool_calls": [{"index": 0, **calls[0]}]},
        {"tool_calls": [{"index": 1, **calls[1]}]},
        {},
    ]
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == calls


def test_why_an_answer_of_calls_ends():
    def reason(end=FinishReason.STOP, **body):
        writer = chat_writer(tools=TOOLS, **body)
        piece = delta(tool_calls=[call(0, "{}", id="c", name="f")])
        return feed(writer, piece, finished(reason=end))[1]["choices"][0]["finish_reason"]

    assert reason() == "tool_calls"
    assert reason(tool_choice="required") == "tool_calls"
    # OpenAI and vLLM: a named tool's call ends with "stop".
    assert reason(tool_choice={"type": "function", "function": {"name": "f"}}) == "stop"
    assert reason(LENGTH) == "length"


def test_usage_in_streams():
    options = {"include_usage": True}
    writer = chat_writer(stream=True, stream_options=options)
    (first, *_) = writer.choices(0, delta(text="a", token_ids=[1]))
    assert writer.chunk([first])["usage"] is None
    writer.choices(0, finished())
    last = writer.chunk([], last=True)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 6
    assert "usage" not in chat_writer(stream=True).chunk([first])
    options = {"include_usage": True, "continuous_usage_stats": True}
    writer = chat_writer(stream=True, stream_options=options, prompt_ids=[[1, 2, 3]])
    (first, *_) = writer.choices(0, delta(text="a", token_ids=[1, 2]))
    usage = writer.chunk([first])["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 2)
