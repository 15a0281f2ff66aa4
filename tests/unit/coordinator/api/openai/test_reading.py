"""Bodies -> requests: options that are served, refused by name, or ignored."""

from __future__ import annotations

import inspect
import json
import math

import openai
import pytest
from jsonschema import Draft202012Validator

from coordinator.api.openai.body import parse_body
from coordinator.api.openai.decisions import (
    CHAT_NEUTRAL,
    COMPLETION_NEUTRAL,
    IGNORED,
    NEUTRAL,
)
from coordinator.api.openai.errors import Failure, Refused, failure_of, param_of
from coordinator.api.openai.models import MAX_PROMPTS, ChatBody, CompletionBody
from coordinator.api.openai.openapi import description
from coordinator.api.openai.requests import read_chat, read_completion
from coordinator.api.values import (
    Constraint,
    GenerateRequest,
    Output,
    Sampling,
    Stop,
    ToolChoice,
)
from coordinator.text.json_bounds import MAX_DEPTH
from coordinator.text.values import Message, ToolCall
from engine.base.errors import (
    CheckpointError,
    DeadlineExceeded,
    DiptychError,
    InvalidRequest,
    Mismatch,
    NotFound,
    NotOffered,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)

USER = [{"role": "user", "content": "x"}]
TOOL = {"type": "function", "function": {"name": "f"}}


def completion(**body):
    return read_completion({"prompt": "x", **body}, "id")


def chat(**body):
    return read_chat({"messages": USER, **body}, "id")


def failure(read, **body) -> Failure:
    with pytest.raises(DiptychError) as caught:
        read(**body)
    return failure_of(caught.value)


# Values


def test_every_option_arrives():
    body = {
        "model": "m",
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 5,
        "min_p": 0.25,
        "frequency_penalty": 1,
        "presence_penalty": -1,
        "repetition_penalty": 1.5,
        "seed": 7,
        "logit_bias": {"5": -100, "6": 2.5},
        "stop": ["a", "b"],
        "stop_token_ids": [1, 2],
        "min_tokens": 3,
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "n": 4,
        "priority": -2,
        "cache_salt": "salt",
        "max_tokens": 9,
    }
    expected = {
        "model": "m",
        "request_id": "id",
        "sampling": Sampling(
            temperature=0.5,
            default_temperature=1.0,
            top_p=0.75,
            top_k=5,
            min_p=0.25,
            frequency_penalty=1,
            presence_penalty=-1,
            repetition_penalty=1.5,
            seed=7,
            logit_bias={5: -100, 6: 2.5},
        ),
        "stop": Stop(
            max_tokens=9,
            min_tokens=3,
            stop=["a", "b"],
            stop_token_ids=[1, 2],
            ignore_eos=True,
            include_stop_str_in_output=True,
        ),
        "n": 4,
        "priority": -2,
        "cache_salt": "salt",
    }
    (request,) = completion(**body, logprobs=2, echo=True).requests
    output = Output(skip_special_tokens=False, logprobs=2, prompt_logprobs=2, echo=True)
    assert request == GenerateRequest(**expected, text="x", output=output)
    got = chat(**body, logprobs=True, top_logprobs=3)
    messages = [Message(role="user", content="x")]
    output = Output(skip_special_tokens=False, logprobs=3)
    assert got.requests[0] == GenerateRequest(**expected, messages=messages, output=output)
    assert got.body.stop_token_ids == [1, 2]


def test_defaults_are_openais():
    (request,) = completion().requests
    assert request.sampling == Sampling(default_temperature=1.0)
    assert request.stop.max_tokens == 16
    assert request.n == 1
    assert request.output.logprobs is None
    got = chat(max_tokens=None, stop=None, temperature=None, tools=None, user=None)
    assert got.requests[0].sampling == Sampling(default_temperature=1.0)
    assert got.requests[0].stop.max_tokens is None  # the room left
    assert not got.body.stream


def test_small_agreements():
    assert chat(top_p=0).requests[0].sampling == Sampling(default_temperature=1.0, top_k=1)
    (request,) = completion(stop="x", top_k=-1, seed=-2, max_tokens=16.0).requests
    assert list(request.stop.stop) == ["x"]
    assert request.sampling.top_k == 0
    assert request.sampling.seed == 2**64 - 2
    assert completion(seed=-1).requests[0].sampling.seed is None
    got = chat(max_tokens=3, max_completion_tokens=5)
    assert got.requests[0].stop.max_tokens == 5
    assert got.names["stop.max_tokens"] == "max_completion_tokens"
    assert chat(logprobs=True).requests[0].output.logprobs == 0
    assert chat(logprobs=False, top_logprobs=0).requests[0].output.logprobs is None


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_prompts(prompt, expected):
    call = completion(prompt=prompt)
    got = [r.token_ids if r.text is None else r.text for r in call.requests]
    assert got == expected
    ids = [r.request_id for r in call.requests]
    assert ids == (["id"] if len(expected) == 1 else [f"id-{i}" for i in range(len(expected))])


def test_prompts_have_names_of_a_length_that_a_request_may_have():
    call = read_completion({"prompt": ["a"] * 11}, "i" * 128)
    ids = [r.request_id for r in call.requests]
    assert len(set(ids)) == 11
    assert max(map(len, ids)) == 128


def test_constraints():
    schema = {"b": 1, "a": {"$ref": "#/x"}}

    def of(**body):
        (request,) = completion(**body).requests
        assert chat(**body).requests[0].constraint == request.constraint
        return request.constraint

    wrapped = {
        "type": "json_schema",
        "json_schema": {"name": "n", "strict": True, "schema": schema},
    }
    assert of(response_format=wrapped) == Constraint("json_schema", json.dumps(schema))
    assert of(response_format={"type": "json_object"}) == Constraint("json_object", True)
    unknown = {"format": "colour", "enum": [{"format": "x"}], "properties": {"format": {}}}
    for strict in (None, False):  # an annotation
        form = {**wrapped, "json_schema": {"name": "n", "strict": strict, "schema": unknown}}
        assert of(response_format=form) == Constraint("json_schema", json.dumps(unknown))
    del unknown["format"]
    form = {**wrapped, "json_schema": {"name": "n", "strict": True, "schema": unknown}}
    assert of(response_format=form) == Constraint("json_schema", json.dumps(unknown))
    held = {"type": "json_object", "schema": schema}
    assert of(response_format=held) == Constraint("json_schema", json.dumps(schema))
    assert of(response_format={"type": "text"}) is None
    assert of(guided_json=schema) == Constraint("json_schema", json.dumps(schema))
    assert of(guided_json='{"a": 1}') == Constraint("json_schema", '{"a": 1}')
    assert of(guided_regex="a+") == Constraint("regex", "a+")
    assert of(guided_grammar="start: X") == Constraint("grammar", "start: X")
    two = Constraint("choice", ["a", "b"])
    assert of(guided_choice=["a", "b"]) == two
    assert of(structured_outputs={"choice": ["a", "b"]}) == two
    assert of(structured_outputs={"json_object": True}) == Constraint("json_object", True)
    assert of(structured_outputs={"regex": "x", "backend": "guidance"}) == Constraint("regex", "x")


def test_messages():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "rules"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "c", "content": "r", "name": "f"},
        {"role": "assistant", "content": "t", "reasoning_content": "never mind"},
    ]
    assert list(chat(messages=messages).requests[0].messages) == [
        Message(role="developer", content="rules"),
        Message(role="user", content="a\nb"),
        Message(role="assistant", tool_calls=(ToolCall(id="c", name="f", arguments='{"a": 1}'),)),
        Message(role="tool", content="r", tool_call_id="c", name="f"),
        Message(role="assistant", content="t", reasoning="never mind"),
    ]


def test_tools():
    named = {"type": "function", "function": {"name": "f"}}
    request = chat(tools=[TOOL], tool_choice=named, parallel_tool_calls=False)
    assert json.loads(request.requests[0].tools_json) == [TOOL]
    assert request.requests[0].tool_choice == ToolChoice(name="f")
    assert not request.requests[0].parallel_tool_calls
    assert request.requests[0].tool_choice.name
    for word in ("none", "auto", "required"):
        got = chat(tools=[TOOL], tool_choice=word)
        assert got.requests[0].tool_choice == ToolChoice(word)
        assert not got.requests[0].tool_choice.name
    assert chat(tools=[TOOL]).requests[0].tool_choice == ToolChoice()


def test_stream_options():
    form = completion(stream=True, stream_options={"include_usage": True})
    assert (form.body.stream, form.include_usage, form.continuous_usage) == (True, True, False)
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    assert chat(stream=True, stream_options=options).continuous_usage


# Refusals

BAD = [
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": [[1], [2, -1]]}, "prompt[1][1]"),
    ({"prompt": [1, 2**32]}, "prompt[1]"),
    ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": "9"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**40}, "max_tokens"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": 1}, "echo"),
    ({"best_of": 3}, "best_of"),
    ({"suffix": "x"}, "suffix"),
]
BAD_CHAT = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "x"}, "messages"),
    ({"messages": ["x"]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0].role"),
    ({"messages": [{"role": "critic", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0].type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
        "messages[0].content[0].type",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "messages[0].content[0].text",
    ),
    ({"messages": [*USER, {"role": "user", "content": "x", "mood": 1}]}, "messages[1].mood"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "c"}]}]},
        "messages[0].tool_calls[0].function",
    ),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": None}]}, "messages[0].content"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": 2}, "logprobs"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"tools": {}}, "tools"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": "maybe"}, "tool_choice"),
    ({"tool_choice": 5}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function.name"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type"),
    ({"functions": [{}]}, "functions"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {}}, "audio"),
    ({"continue_final_message": True}, "continue_final_message"),
]
BAD_COMMON = [
    ({"model": 5}, "model"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": 5}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_k": -2}, "top_k"),
    ({"seed": 2**64}, "seed"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias[x]"),
    ({"logit_bias": {"-1": 1}}, "logit_bias[-1]"),
    ({"logit_bias": {"5": "x"}}, "logit_bias[5]"),
    ({"stop": 5}, "stop"),
    ({"stop": ["x", 5]}, "stop"),
    ({"stop_token_ids": "x"}, "stop_token_ids"),
    ({"stop_token_ids": [1, -1]}, "stop_token_ids[1]"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"priority": 2**31}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"strict": True, "schema": {"items": {"format": "colour"}}},
            }
        },
        "response_format.json_schema.schema",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
        "response_format.json_schema.schema",
    ),
    ({"guided_json": 5}, "guided_json"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": [1]}, "guided_choice"),
    ({"guided_regex": 5}, "guided_regex"),
    ({"guided_json": {}, "guided_regex": "x"}, "guided_regex"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "x"}},
     "structured_outputs.regex"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"yaml": 1}}, "structured_outputs.yaml"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"use_beam_search": 0}, "use_beam_search"),
    ({"bad_words": ["x"]}, "bad_words"),
    ({"logits_processors": ["x"]}, "logits_processors"),
    ({"temprature": 1}, "temprature"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), [*BAD, *BAD_COMMON])
def test_completions_refuse_by_name(body, param):
    found = failure(completion, **body)
    assert (found.status, found.param) == (400, param)
    assert found.type == "invalid_request_error"
    assert param.partition("[")[0].partition(".")[0] in found.message


@pytest.mark.parametrize(("body", "param"), [*BAD_CHAT, *BAD_COMMON])
def test_chat_refuses_by_name(body, param):
    found = failure(chat, **body)
    assert (found.status, found.param) == (400, param)


def test_codes_of_unknown_and_of_unsupported_options():
    assert failure(completion, temprature=1).code == "unknown_parameter"
    assert failure(completion, suffix="x").code == "unsupported_parameter"
    assert failure(completion, max_tokens=-1).code is None


CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
SERVED = {
    CHAT: frozenset(ChatBody.__struct_fields__),
    COMPLETION: frozenset(CompletionBody.__struct_fields__),
}
READERS = {CHAT: chat, COMPLETION: completion}
NEUTRALS = {CHAT: {**NEUTRAL, **CHAT_NEUTRAL}, COMPLETION: {**NEUTRAL, **COMPLETION_NEUTRAL}}
CONTENT = ("prompt", "messages")  # which may not be null


@pytest.mark.parametrize("path", READERS)
def test_the_tables_match_the_readers(path):
    read, served, neutral = READERS[path], SERVED[path], NEUTRALS[path]
    assert not served & IGNORED
    assert not (served | IGNORED) & neutral.keys()
    odd = {"an": ["odd", {"thing": None}]}
    for name in served:
        value = 5 if name in ("guided_json", "chat_template_kwargs") else odd  # any object
        found = failure(read, **{name: value})  # it is checked
        assert found.param
        assert found.param.startswith(name)
        assert found.param != name or found.code is None
        if name not in CONTENT:
            read(**{name: None})
    for name, harmless in neutral.items():
        for value in (None, *harmless):
            assert read(**{name: value}) == read()
        found = failure(read, **{name: odd})
        assert (found.param, found.code) == (name, "unsupported_parameter")
    for name in IGNORED:
        assert read(**{name: odd}) == read()
    assert failure(read, temprature=1).code == "unknown_parameter"


# Parameters that the client does not send.
OF_THE_CLIENT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}


@pytest.mark.parametrize(
    ("path", "method"),
    [
        (CHAT, openai.resources.chat.Completions.create),
        (CHAT, openai.resources.chat.Completions.parse),
        (CHAT, openai.resources.chat.Completions.stream),
        (COMPLETION, openai.resources.Completions.create),
    ],
)
def test_every_option_of_the_openai_client_is_decided(path, method):
    asked = set(inspect.signature(method).parameters) - OF_THE_CLIENT
    assert len(asked) > 15
    assert not asked - SERVED[path] - NEUTRALS[path].keys() - IGNORED


def test_every_described_option_is_known():
    schemas = description("0")["paths"]

    def properties(path):
        body = schemas[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        return body["properties"]

    for read, path in [(completion, "/v1/completions"), (chat, "/v1/chat/completions")]:
        assert SERVED[path] <= properties(path).keys()
        for name in properties(path):
            if name not in CONTENT:
                read(**{name: None})


def test_the_first_option_that_is_not_known_is_named():
    names = [f"other{i}" for i in range(8)]
    for first in range(8):
        body = dict.fromkeys(names[first:] + names[:first], 1)
        with pytest.raises(Refused) as caught:
            completion(**body)
        assert failure_of(caught.value).param == names[first]


def test_descriptions_are_as_narrow_as_what_is_accepted():
    post = description("0")["paths"]

    def accepts(path, name, value):
        body = post[path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        return Draft202012Validator(body["properties"][name]).is_valid(value)

    prompts = ["a", ["a", "b"], [1, 2], [[1], [2, 3]]]
    assert all(accepts("/v1/completions", "prompt", prompt) for prompt in prompts)
    for prompt in (5, [], [-1], ["a", 1], [1 << 32], [[1], ["a"]], ["a"] * (MAX_PROMPTS + 1)):
        assert not accepts("/v1/completions", "prompt", prompt), prompt
    function = {"name": "f.g-1", "description": "d", "parameters": {}, "strict": True}
    assert accepts("/v1/chat/completions", "tools", [{"type": "function", "function": function}])
    for wrong in ({"name": "a b"}, {"name": "a" * 65}, {}, {"name": "f", "parameters": 1}):
        tools = [{"type": "function", "function": wrong}]
        assert not accepts("/v1/chat/completions", "tools", tools), wrong
    assert not accepts("/v1/chat/completions", "tools", [{"type": "code", "function": function}])
    assert not accepts("/v1/completions", "request_id", "a" * 129)


# Bodies


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b"5",
        b"{",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b"\xff\xfe{}",
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    ],
)
def test_malformed_bodies(raw):
    with pytest.raises(Refused) as caught:
        parse_body(raw)
    assert caught.value.failure.status == 400
    assert caught.value.failure.code == "invalid_json"


def test_a_deep_body_with_escapes():
    deep = MAX_DEPTH - 1
    body = b'{"a": ' + b"[" * deep + b"]" * deep + b', "b": "\\ud83d\\ude00", "c": 1e999}'
    got = parse_body(body)
    assert got["b"] == "\U0001f600"
    assert got["c"] == math.inf  # refused where it is used as a number


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 0}, "n: 0; expected 1 to 64"),
        ({"n": "x"}, "n: expected a whole number"),
        ({"seed": 2**64}, f"seed: {2**64}; expected {-(2**63)} to {2**64 - 1}"),
        ({"seed": -(2**63) - 1}, f"seed: {-(2**63) - 1}; expected {-(2**63)} to {2**64 - 1}"),
        ({"max_tokens": 10**40}, f"max_tokens: a huge number; expected 0 to {2**32 - 1}"),
        ({"temperature": "hot"}, "temperature: expected a number"),
        (
            {"temperature": 10**400},
            "temperature: expected a number of a size that a float",
        ),
        ({"stream": 1}, "stream: expected true or false"),
        ({"model": 1}, "model: expected text"),
        ({"stop": ["x", 5]}, "stop: expected text or an array of texts"),
        ({"stop_token_ids": 5}, "stop_token_ids: expected an array of whole numbers"),
        ({"stop_token_ids": [1, -1]}, f"stop_token_ids[1]: -1; expected 0 to {2**32 - 1}"),
        ({"logit_bias": {"1": 1, "2": True}}, "logit_bias[2]: expected a number"),
        ({"logit_bias": {"1": 1, "2": 10**400}}, "logit_bias[2]: expected a number of a size that"),
        ({"logit_bias": []}, "logit_bias: expected an object of token ids and numbers"),
        ({"stream": True, "stream_options": 5}, "stream_options: expected an object"),
        ({"guided_json": 5}, "guided_json: expected a JSON schema, an object"),
        ({"guided_choice": [1]}, "guided_choice: expected an array of at least one text"),
        (
            {"response_format": {}},
            "response_format.type: expected text, json_object",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema: unset; expected a schema and its name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": 5}},
            "response_format.json_schema: expected an object",
        ),
        ({"messages": [{"role": "critic"}]}, "messages[0].role: expected one of system, develo"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content: expected text or",
        ),
        ({"messages": 5}, "messages: expected an array of at least one message"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}]},
            "messages[0].tool_calls[0].function.name: expected text",
        ),
        ({"tool_choice": 5}, "tool_choice: expected none, auto, required or a function"),
    ],
)
def test_errors_are_written_from_the_declarations(body, message):
    assert failure(chat, **body).message.startswith(message)


# Errors

TABLE = [
    (InvalidRequest("stop.max_tokens", "no"), 400, None),
    (NotOffered("n above 1"), 400, "unsupported_parameter"),
    (Unauthenticated("x"), 401, "invalid_api_key"),
    (PermissionDenied("x"), 403, None),
    (NotFound("x"), 404, "model_not_found"),
    (Overloaded("x", 2.25), 429, "rate_limit_exceeded"),
    (Unavailable("x", 0.5), 503, "service_unavailable"),
    (DeadlineExceeded("x"), 504, "deadline_exceeded"),
    (Mismatch("x"), 500, "internal_error"),
    (CheckpointError("x"), 500, "internal_error"),
]


@pytest.mark.parametrize(("error", "status", "code"), TABLE)
def test_the_table(error, status, code):
    found = failure_of(error)
    assert (found.status, found.code) == (status, code)
    assert set(found.body["error"]) == {"message", "type", "param", "code"}


def test_the_time_to_wait():
    assert failure_of(Overloaded("x", 2.25)).headers == {
        "retry-after": "3",
        "retry-after-ms": "2250",
    }
    assert failure_of(Unavailable("x", 0.0)).headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ("sampling.temperature", "temperature"),
        ("stop.stop[1]", "stop[1]"),
        ("stop.max_tokens", "max_completion_tokens"),
        ("output.logprobs", "top_logprobs"),
        ("tools_json[0].function.name", "tools[0].function.name"),
        ("tools_json[1].function.parameters", "tools[1].function.parameters"),
        ("constraint.json_schema", "response_format.json_schema"),
        ("messages[0].role", "messages[0].role"),
        ("model", "model"),
    ],
)
def test_fields_are_named_as_the_client_does(field, param):
    form = {"type": "json_object"}
    assert param_of(field, chat(max_completion_tokens=5, response_format=form).names) == param
    call = completion(prompt=["a", "b"])
    assert param_of("token_ids.ids[3]", call.names_of(1)) == "prompt[1][3]"
    assert param_of("text", call.names_of(0)) == "prompt[0]"


@pytest.mark.parametrize(
    ("field", "option", "param"),
    [
        ("constraint", {"guided_regex": "a"}, "guided_regex"),
        ("constraint.regex", {"guided_regex": "a"}, "guided_regex"),
        ("constraint.regex", {"structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
        (
            "constraint.choice.choices[1]",
            {"structured_outputs": {"choice": ["a", ""]}},
            "structured_outputs.choice[1]",
        ),
    ],
)
def test_constraints_are_named_as_the_client_does(field, option, param):
    assert param_of(field, chat(**option).names) == param
    assert param_of(field, completion(**option).names_of(0)) == param
