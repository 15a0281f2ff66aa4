"""Requests from options: every option of the API by its name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from coordinator.client import chat_request, generate_request
from coordinator.text.served_model import Limits
from engine.pb.diptych.v1 import inference_pb2
from tests.support.validated import validated

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
TURNS = [{"role": "user", "content": "Hi"}]


def fields(message: Any) -> dict[str, Any]:
    """The set fields of a message."""
    return {field.name: value for field, value in message.ListFields()}


OPTIONS = {
    "sampling": {
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 5,
        "min_p": 0.125,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
        "repetition_penalty": 1.5,
        "seed": 7,
        "logit_bias": {5: -100.0},
    },
    "stop": {
        "max_tokens": 9,
        "min_tokens": 2,
        "stop": ["a", "b"],
        "stop_token_ids": [3, 4],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
    },
    "output": {
        "logprobs": 2,
        "prompt_logprobs": 0,
        "echo": True,
        "skip_special_tokens": False,
    },
    "": {"request_id": "r", "model": "m", "n": 3, "priority": -1, "cache_salt": "s"},
}


@pytest.mark.parametrize("make", [generate_request, chat_request])
def test_every_option_goes_to_its_field(make: Any) -> None:
    given = {key: value for part in OPTIONS.values() for key, value in part.items()}
    request = make("x" if make is generate_request else TURNS, **given)
    for part, wanted in OPTIONS.items():
        found = fields(getattr(request, part) if part else request)
        for key, value in wanted.items():
            assert found[key] == value, key
    for part in ("sampling", "stop", "output"):
        names = {field.name for field in getattr(request, part).DESCRIPTOR.fields}
        assert names == OPTIONS[part].keys(), "an option that is not tried here"


def test_omitted_options_stay_unset() -> None:
    request = generate_request("x", temperature=None, n=None, json_object=False, regex=None)
    assert fields(request) == {"text": "x"}
    assert fields(generate_request([1, 2])) == {"token_ids": inference_pb2.TokenIds(ids=[1, 2])}
    assert fields(chat_request(TURNS, tools=[], tool_choice=None)).keys() == {"messages"}


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
CONSTRAINTS = [
    ({"json_schema": SCHEMA}, {"json_schema": json.dumps(SCHEMA)}),
    ({"json_schema": '{"type": "string"}'}, {"json_schema": '{"type": "string"}'}),
    ({"json_object": True}, {"json_object": True}),
    ({"regex": "a+", "json_object": False}, {"regex": "a+"}),
    ({"grammar": 'start: "a"'}, {"grammar": 'start: "a"'}),
    ({"choice": ["yes", "no"]}, {"choice": inference_pb2.Choices(choices=["yes", "no"])}),
    ({"choice": "yes"}, {"choice": inference_pb2.Choices(choices=["yes"])}),
]


@pytest.mark.parametrize(("options", "wanted"), CONSTRAINTS)
def test_a_constraint_is_an_option_by_the_name_of_its_kind(
    options: dict[str, Any], wanted: dict[str, Any]
) -> None:
    for request in (generate_request("x", **options), chat_request(TURNS, **options)):
        assert fields(request.constraint) == wanted


def test_invalid_options_are_refused() -> None:
    with pytest.raises(TypeError, match="more than one constraint: json_schema and regex"):
        generate_request("x", json_schema=SCHEMA, regex="a")
    with pytest.raises(TypeError, match="unknown option 'tempo'"):
        chat_request(TURNS, tempo=1)
    with pytest.raises(TypeError, match="unknown option 'tools'"):
        generate_request("x", tools=[WEATHER])


def test_one_stop_string_may_stand_alone() -> None:
    assert generate_request("x", stop="end").stop.stop == ["end"]


def test_tools_and_their_choice() -> None:
    request = chat_request(TURNS, tools=[WEATHER], parallel_tool_calls=False)
    assert json.loads(request.tools_json) == [WEATHER]
    assert request.HasField("parallel_tool_calls")
    assert not request.parallel_tool_calls
    assert not request.HasField("tool_choice")
    for word in ("none", "auto", "required"):
        choice = chat_request(TURNS, tools=[WEATHER], tool_choice=word).tool_choice
        assert choice.mode == inference_pb2.ToolChoice.Mode.Value(f"MODE_{word.upper()}")
    named: Any
    for named in ({"type": "function", "function": {"name": "weather"}}, {"name": "weather"}):
        choice = chat_request(TURNS, tools=[WEATHER], tool_choice=named).tool_choice
        assert choice.name == "weather"
    with pytest.raises(ValueError, match="tool_choice"):
        chat_request(TURNS, tools=[WEATHER], tool_choice="weather")


def test_a_conversation_with_calls_and_results() -> None:
    openai = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    ours = {"id": "2", "name": "weather", "arguments": {"city": "Paris"}}
    request = chat_request(
        [
            *TURNS,
            {"role": "assistant", "content": None, "tool_calls": [openai, ours]},
            {"role": "tool", "tool_call_id": "1", "content": "rain"},
            {"role": "user", "name": "Ann", "content": "And now?"},
        ],
        tools=[WEATHER],
    )
    asked = request.messages[1]
    assert not asked.HasField("content")
    assert [(c.id, c.name, c.arguments) for c in asked.tool_calls] == [
        ("1", "weather", "{}"),
        ("2", "weather", '{"city": "Paris"}'),
    ]
    assert (request.messages[2].tool_call_id, request.messages[2].content) == ("1", "rain")
    assert request.messages[3].name == "Ann"
    checked = validated(request, Limits("m", 100, (0,), 1000))
    assert checked.messages is not None
    assert [c.arguments for c in checked.messages[1].tool_calls] == [{}, {"city": "Paris"}]
    with pytest.raises(ValueError, match="nonsense"):
        chat_request([{"role": "user", "content": "x", "nonsense": 1}])


def test_an_assistant_message_as_clients_dump_it() -> None:
    call = {"id": None, "index": 0, "function": {"name": "weather", "arguments": None}}
    call["function"]["parsed_arguments"] = {"city": "Paris"}  # type: ignore[index]
    dumped = {"parsed": {"a": 1}, "annotations": [], "reasoning_content": "so", "audio": None}
    request = chat_request(
        [
            *TURNS,
            {"role": "assistant", "content": None, "tool_calls": [call], **dumped},
            {"role": "assistant", "content": None, "refusal": "no", **dumped},
            {"role": "assistant", **dumped},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
        ]
    )
    called, refused, silent, asked = request.messages[len(TURNS) :]
    assert [(c.id, c.name, c.arguments) for c in called.tool_calls] == [("", "weather", "")]
    assert (refused.content, silent.HasField("content"), asked.content) == ("no", False, "a\nb")
    assert validated(request, Limits("m", 100, (0,), 1000)).messages
    with pytest.raises(ValueError, match="image_url"):
        chat_request([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}])


def test_text_in_other_places_of_an_assistant_message() -> None:
    odd = [
        {"function_call": {"name": "weather", "arguments": "{}"}, "content": None},
        {"tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "run", "input": "go"}}]},
        {"content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "a"}]},
        {"content": None, "audio": {"id": "a", "transcript": "said"}},
    ]
    request = chat_request([{"role": "assistant", **fields} for fields in odd])
    older, custom, thought, spoken = request.messages
    assert [(c.id, c.name, c.arguments) for c in older.tool_calls] == [("", "weather", "{}")]
    assert [(c.id, c.name, c.arguments) for c in custom.tool_calls] == [
        ("c", "run", '{"input": "go"}')
    ]
    assert (thought.content, spoken.content) == ("a", "said")
    with pytest.raises(ValueError, match="thinking"):
        chat_request([{"role": "user", "content": [{"type": "thinking", "thinking": "so"}]}])
