"""The form of tool calls, found from a chat template. Real templates: tests/models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coordinator.text.chat_template import ChatTemplate, template_messages
from coordinator.text.tools.detection import detect
from coordinator.text.tools.forms import FORMATS
from coordinator.text.values import Message, ToolCall
from engine.base.errors import InvalidRequest

HEAD = """{%- for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"""
TURNS = """{%- for m in messages %}[{{ m.role }}]{{ m.content or '' }}
{%- for c in m.tool_calls or [] %}{% set f = c.function %}CALL{% endfor %}{% endfor %}"""
XML = """<tool_call>
<function={{ f.name }}>
{% for k, v in f.arguments | items %}<parameter={{ k }}>
{{ v if v is string else v | tojson }}
</parameter>
{% endfor %}</function>
</tool_call>"""
TEMPLATES = {
    "hermes": '<tool_call>{{ {"name": f.name, "arguments": f.arguments} | tojson }}</tool_call>',
    "llama3": '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}',
    "mistral_args": "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}",
    "mistral_call_id": "{% if c.id | length != 9 %}{{ raise_exception('id') }}{% endif %}"
    "[TOOL_CALLS]{{ f.name }}[CALL_ID]{{ c.id }}[ARGS]{{ f.arguments | tojson }}",
    "qwen3_coder": XML,
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.{{ f.name }}:0"
    "<|tool_call_argument_begin|>{{ f.arguments | tojson }}<|tool_call_end|>",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{{ f.name }}<｜tool▁sep｜>"
    "{{ '' + f.arguments }}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",  # JSON texts only
    "harmony": "<|start|>assistant to=functions.{{ f.name }}<|channel|>commentary json<|message|>"
    "{{ f.arguments | tojson }}<|call|>",
    "gemma4": "<|tool_call>call:{{ f.name + '{' }}"
    '{% for k, v in f.arguments | items %}{{ "," if not loop.first }}{{ k }}:'
    "{{ '<|\"|>' + v + '<|\"|>' if v is string else v }}{% endfor %}}<tool_call|>",
}


def loaded(folder: Path, source: str) -> ChatTemplate:
    (folder / "chat_template.jinja").write_text(source)
    return ChatTemplate.load(folder)


def form_of(template: ChatTemplate) -> tuple[str, str, bool]:
    found = detect(template.probe, template.text, shows_tools=template.shows_tools)
    return found.form.name, found.evidence, found.writes_calls


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_form_that_a_template_writes(tmp_path, name):
    template = loaded(tmp_path, HEAD + TURNS.replace("CALL", TEMPLATES[name]))
    assert form_of(template) == (name, "rendered", True)


def test_words_in_the_source_are_no_evidence_where_a_call_is_written(tmp_path):
    words = "{# <tool_call> {'name', 'arguments'} #}"
    template = loaded(tmp_path, words + HEAD + TURNS.replace("CALL", TEMPLATES["llama3"]))
    assert form_of(template)[:2] == ("llama3", "rendered")


def test_the_source_counts_where_no_call_is_written(tmp_path):
    words = "Write <tool_call>{'\"name\"': ..., '\"arguments\"': ...}</tool_call>."
    assert form_of(loaded(tmp_path, words + HEAD + TURNS.replace("CALL", ""))) == (
        "hermes",
        "source",
        False,
    )
    refuses = "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}"
    source = refuses + "{# [TOOL_CALLS] #}" + HEAD
    assert form_of(loaded(tmp_path, source)) == ("mistral", "source", False)


def test_a_form_that_is_not_known(tmp_path):
    template = loaded(tmp_path, HEAD + TURNS.replace("CALL", "!!{{ f.name }} {{ f.arguments }}"))
    assert form_of(template) == ("none", "", True)


def test_a_template_without_tools_gets_them_in_the_system_message(tmp_path):
    assert form_of(loaded(tmp_path, TURNS.replace("CALL", ""))) == ("hermes", "prompt", False)


CALLING = [
    Message("user", "q"),
    Message("assistant", None, tool_calls=[ToolCall("call_1", "look", {"city": "Oslo"})]),
    Message("tool", "rain", tool_call_id="call_1"),
]
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def test_a_template_that_shows_tools_but_no_calls_gets_them_as_content(tmp_path):
    template = loaded(tmp_path, HEAD + TURNS.replace("CALL", ""))
    form = FORMATS["lfm2"]
    messages = template_messages(CALLING, form)
    with_calls = template.render(messages, [TOOL], tool_format=form, writes_calls=False)
    assert '[assistant]<|tool_call_start|>[look(city="Oslo")]<|tool_call_end|>[tool]' in with_calls
    assert with_calls.startswith(json.dumps(TOOL))
    assert "look(" not in template.render(messages, [TOOL], tool_format=form)


def test_ids_are_numbered_where_the_family_numbers_them():
    again = [Message("assistant", "", tool_calls=[ToolCall("x", "look", {})])]
    messages = template_messages([*CALLING, *again], FORMATS["kimi_k2"])
    ids = [call["id"] for m in messages for call in m.get("tool_calls", ())]
    assert ids == ["functions.look:0", "functions.look:1"]
    assert messages[2]["tool_call_id"] == "functions.look:0"


def test_a_template_that_cannot_be_rendered_at_all(tmp_path):
    template = loaded(tmp_path, HEAD + "{{ 1 / 0 }}")
    with pytest.raises(InvalidRequest):
        template.probe([{"role": "user", "content": "q"}], [TOOL])
    assert form_of(template) == ("none", "", False)
