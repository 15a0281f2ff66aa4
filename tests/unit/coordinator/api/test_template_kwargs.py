"""Variables that a client gives to the chat template, and the reasoning that it gets back."""

from __future__ import annotations

import json

import pytest

from coordinator.api.grpc.responses import response
from coordinator.api.openai.chat_responses import ChatWriter
from coordinator.api.openai.requests import read_chat
from coordinator.api.validation.template_kwargs import MAX_CHARS, check_template_kwargs
from coordinator.generation.events import Delta, Usage
from coordinator.text.chat_template import ChatTemplate
from coordinator.text.served_model import Limits
from engine.base.errors import InvalidRequest
from engine.pb.diptych.v1 import inference_pb2 as pb
from tests.support.answer_events import finished
from tests.support.validated import validated

LIMITS = Limits("m", 100, (2,), 1000)
MESSAGES = [{"role": "user", "content": "x"}]


def test_variables_are_a_small_object_of_free_names():
    check = check_template_kwargs
    assert check("f", "") == check("f", "null") == check("f", "{}") == {}
    assert check("f", '{"enable_thinking": false, "a": {"b": [1]}}') == {
        "enable_thinking": False,
        "a": {"b": [1]},
    }
    long = json.dumps({"a": "x" * MAX_CHARS})
    for source in ("[1]", "{", '{"a b": 1}', '{"_x": 1}', '{"messages": []}', long):
        with pytest.raises(InvalidRequest) as caught:
            check("f", source)
        assert caught.value.field == "f"


def test_variables_reach_the_request():
    request = pb.ChatRequest(
        messages=[pb.Message(role="user", content="x")], template_kwargs_json='{"a": 1}'
    )
    assert validated(request, LIMITS).template_kwargs == {"a": 1}
    body = {"messages": MESSAGES, "chat_template_kwargs": {"a": 1}, "reasoning_effort": "low"}
    (of_http,) = read_chat(body, "r").requests
    assert json.loads(of_http.template_kwargs_json) == {"reasoning_effort": "low", "a": 1}


def test_variables_reach_the_template(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ a }}{{ messages | length }}{{ tools }}")
    template = ChatTemplate.load(tmp_path)
    assert template.render(MESSAGES, kwargs={"a": "t", "tools": 5}) == "t1None"


def test_reasoning_in_responses():
    call = read_chat({"messages": MESSAGES}, "r")
    writer = ChatWriter(call=call, model="m", created=0)
    choices: dict = {}
    used = Usage(3, 9, 0, 0, 0, reasoning_tokens=4)
    events = [Delta(reasoning="Hm, "), Delta(reasoning="so."), Delta(text="4"), finished(used=used)]
    for event in events:
        for part in writer.choices(0, event):
            choices[0] = writer.fold(choices.get(0), part)
    whole = writer.whole(choices)
    message = whole["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm, so.", "4")
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": 4}
    stream = ChatWriter(call=call, model="m", created=0)
    deltas = [c["delta"] for event in events[:3] for c in stream.choices(0, event)]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Hm, "},
        {"reasoning_content": "so."},
        {"content": "4"},
    ]
    assert response("r", events[0]).delta.reasoning == "Hm, "
    assert response("r", events[3]).finished.usage.reasoning_tokens == 4


def test_a_model_without_reasoning_has_none_of_its_fields():
    writer = ChatWriter(call=read_chat({"messages": MESSAGES}, "r"), model="m", created=0)
    choices: dict = {}
    for event in (Delta(text="4"), finished()):
        for part in writer.choices(0, event):
            choices[0] = writer.fold(choices.get(0), part)
    text = json.dumps(writer.whole(choices))
    assert "reasoning" not in text
