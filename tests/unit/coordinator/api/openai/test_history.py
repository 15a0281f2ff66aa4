"""Assistant's messages, as the API and its clients return them, are accepted as history."""

from __future__ import annotations

import json

import openai
import pytest
from pydantic import BaseModel

from coordinator.api.openai.errors import failure_of
from coordinator.api.openai.requests import read_chat
from coordinator.text.values import Message, ToolCall
from engine.base.errors import DiptychError
from engine.pb.diptych.v1 import inference_pb2 as pb
from tests.support.http_front import http_front

USER = {"role": "user", "content": "x"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string"}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}
CALLS = 'I look.\n<tool_call>\n{"name": "look", "arguments": {"at": "river"}}\n</tool_call>'


class River(BaseModel):
    name: str


async def asked(client, way, **body):
    """The assistant's message of a request, by one of the client's methods."""
    body = {"model": "smollm2", "messages": [USER], **body}
    if way == "create":
        body.pop("response_format", None)
        return (await client.chat.completions.create(**body)).choices[0].message
    if way == "parse":
        return (await client.chat.completions.parse(**body)).choices[0].message
    async with client.chat.completions.stream(**body) as stream:
        return (await stream.get_final_completion()).choices[0].message


@pytest.mark.parametrize("way", ["create", "parse", "stream"])
@pytest.mark.parametrize(
    ("text", "body"),
    [
        ("A river.", {}),
        ('{"name": "Nile"}', {"response_format": River}),
        (CALLS, {"tools": [TOOL]}),
        (CALLS.removeprefix("I look.\n"), {"tools": [TOOL]}),
    ],
    ids=["text", "parsed", "call", "call alone"],
)
async def test_messages_of_the_openai_client_come_back(way, text, body):
    async with http_front() as f:
        worker = await f.worker(text + "<|im_end|>", group=3)
        base = f"http://{f.coordinator.http_address}/v1"
        async with openai.AsyncOpenAI(base_url=base, api_key="x", max_retries=0) as client:
            message = await asked(client, way, **body)
            prompts = set()
            for dumped in (
                message,
                message.model_dump(),
                message.model_dump(exclude_none=True),
                message.model_dump(exclude_unset=True),
                message.to_dict(),
                json.loads(message.model_dump_json()),
            ):
                called = [
                    {"role": "tool", "tool_call_id": call.id, "content": "water"}
                    for call in message.tool_calls or ()
                ]
                history = [USER, dumped, *called, {"role": "user", "content": "And?"}]
                tools = {"tools": [TOOL]} if called else {}
                await client.chat.completions.create(model="smollm2", messages=history, **tools)
                prompts.add(tuple(worker.requests[-1].prompt_token_ids))
    (prompt,) = prompts  # for every form of dump
    assert text in f.tokenizer.decode(list(prompt), False)


@pytest.mark.parametrize("arguments", ['{"at": "riv', "null", "", "[]", "5", '"x"'])
async def test_a_call_of_any_arguments_does_not_poison_its_conversation(arguments):
    async with http_front() as f:
        worker = await f.worker()
        call = {**CALL, "function": {"name": "look", "arguments": arguments}}
        history = [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "not JSON"},
        ]
        got = await f.chat(messages=history, tools=[TOOL], max_tokens=2)
        assert got.status_code == 200, got.text
        prompt = f.tokenizer.decode(worker.requests[-1].prompt_token_ids, False)
        assert '{"name": "look", "arguments": {' in prompt
        assert json.dumps(arguments)[1:-1] in prompt or arguments in ("null", "", "[]", '"x"')
        message = pb.Message(
            role="assistant",
            tool_calls=[pb.ToolCall(id="c", name="look", arguments=arguments)],
        )
        asked = pb.ChatRequest(
            messages=[message, pb.Message(role="user", content="x")], stop=pb.Stop(max_tokens=2)
        )
        assert [r async for r in f.stub.Chat(asked, timeout=10)]


def message(**fields):
    body = {"messages": [USER, {"role": "assistant", **fields}]}
    return read_chat(body, "id").requests[0].messages[1]


def failure(**fields):
    with pytest.raises(DiptychError) as caught:
        message(**fields)
    return failure_of(caught.value)


OF_AN_OUTPUT = {
    "refusal": None,
    "annotations": [],
    "audio": None,
    "function_call": None,
    "parsed": {"any": 1},
    "reasoning_details": [{"type": "reasoning.text"}],
    "thinking_blocks": [{"type": "thinking"}],
    "provider_specific_fields": {"x": 1},
    "images": [],
    "id": "msg_1",
    "index": 0,
    "token_ids": [1],
    "whatever": {"comes": "next"},
}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_comes_back(name):
    expected = Message(role="assistant", content="a", reasoning="so")
    assert message(content="a", **{name: "so"}) == expected


@pytest.mark.parametrize("name", OF_AN_OUTPUT)
def test_what_an_output_has_besides_is_passed_over(name):
    value = OF_AN_OUTPUT[name]
    assert message(content="a", **{name: value}) == Message(role="assistant", content="a")


def test_calls_as_clients_dump_them():
    extra = {**CALL, "index": 0, "provider": "x"}
    extra["function"] = {**CALL["function"], "parsed_arguments": {"a": 1}}
    expected = [ToolCall(id="c", name="f", arguments="{}")]
    assert list(message(content=None, tool_calls=[extra]).tool_calls) == expected
    assert list(message(tool_calls=[extra], function_call=None).tool_calls) == expected
    as_object = {**CALL, "function": {"name": "f", "arguments": {"a": 1}}}
    (call,) = message(tool_calls=[as_object]).tool_calls
    assert call.arguments == '{"a": 1}'
    none = {**CALL, "type": None, "function": {"name": "f", "arguments": None}}
    assert message(tool_calls=[none]).tool_calls[0].arguments == ""
    custom = {"id": "c", "type": "custom", "custom": {"name": "f", "input": "go"}}
    (call,) = message(tool_calls=[custom]).tool_calls
    assert (call.id, call.name, call.arguments) == ("c", "f", '{"input": "go"}')
    (call,) = message(function_call={"name": "f", "arguments": "{}"}).tool_calls
    assert (call.id, call.name, call.arguments) == ("", "f", "{}")


def test_where_an_outputs_text_stands():
    for fields, content in [
        ({"content": None}, ""),
        ({}, ""),
        ({"content": ""}, ""),
        ({"content": None, "tool_calls": []}, ""),
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": None, "audio": {"id": "a", "transcript": "said"}}, "said"),
        ({"content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"content": [{"type": "thinking", "thinking": "so"}, {"type": "text", "text": "a"}]}, "a"),
        ({"content": [{"type": "output_text", "text": "a", "annotations": []}]}, "a"),
    ]:
        assert message(**fields).content == content, fields
        assert message(**fields).content is not None
    assert message(tool_calls=[CALL]).content is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"content": 5}, "content"),
        ({"content": "a", "refusal": 5}, "refusal"),
        ({"content": "a", "name": 5}, "name"),
        ({"content": "a", "annotations": "x"}, "annotations"),
        ({"content": "a", "audio": "x"}, "audio"),
        ({"content": "a", "audio": {"transcript": 5}}, "audio.transcript"),
        ({"content": None, "audio": {"id": "a"}}, "audio"),
        ({"content": "a", "function_call": "x"}, "function_call"),
        ({"function_call": {"arguments": "{}"}}, "function_call.name"),
        ({"tool_calls": {}}, "tool_calls"),
        ({"tool_calls": ["x"]}, "tool_calls[0]"),
        ({"tool_calls": [{**CALL, "id": 5}]}, "tool_calls[0].id"),
        ({"tool_calls": [{**CALL, "type": "web"}]}, "tool_calls[0].type"),
        ({"tool_calls": [{**CALL, "function": "f"}]}, "tool_calls[0].function"),
        ({"tool_calls": [{**CALL, "function": {}}]}, "tool_calls[0].function.name"),
        (
            {"tool_calls": [{**CALL, "function": {"name": "f", "arguments": [1]}}]},
            "tool_calls[0].function.arguments",
        ),
        ({"tool_calls": [{"type": "custom"}]}, "tool_calls[0].custom"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, "content[0].type"),
    ],
)
def test_known_fields_of_wrong_types_are_refused_by_name(fields, param):
    found = failure(**fields)
    assert (found.status, found.param) == (400, f"messages[1].{param}")


def test_what_applications_note_in_their_own_messages():
    noted = {"id": "m", "metadata": {}, "cache_control": {"type": "ephemeral"}}
    nulls = {"tool_calls": None, "refusal": None, "annotations": None, "parsed": None}
    parts = [{"type": "text", "text": "r", "cache_control": {}, "id": "p"}]
    history = [
        {"role": "system", "content": "s", **noted},
        {"role": "user", "content": parts, **noted, **nulls},
        {"role": "tool", "tool_call_id": "c", "content": parts, **noted, **nulls},
        {"role": "function", "name": "f", "content": "r"},
        {"role": "function", "name": "f", "content": None},  # as OpenAI's client types it
    ]
    assert list(read_chat({"messages": history}, "id").requests[0].messages) == [
        Message(role="system", content="s"),
        Message(role="user", content="r"),
        Message(role="tool", tool_call_id="c", content="r"),
        Message(role="tool", name="f", content="r"),
        Message(role="tool", name="f", content=""),
    ]
