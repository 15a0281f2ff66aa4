"""Chat templates render as in transformers; a template's refusal is an invalid request."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import structlog

from coordinator.api.validation.tools import check_tool_calls
from coordinator.text import template_budget
from coordinator.text.chat_template import ChatTemplate, template_messages
from coordinator.text.tools.json_forms import HERMES, MISTRAL
from coordinator.text.values import Message, ToolCall
from engine.base.errors import InvalidRequest
from engine.checkpoint.source import resolve
from engine.pb.diptych.v1 import inference_pb2 as pb

SYSTEM = {"role": "system", "content": "You are terse."}
USER = {"role": "user", "content": "What is 2 + 2? <b>&amp;</b> \u4e2d\U0001f600"}
ASSISTANT = {"role": "assistant", "content": "4\n"}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<\u00e9>", "x": {}}}]


def write(folder: Path, template: Any, **more: Any) -> Path:
    config = {"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | more))
    return folder


def theirs(template: str, messages: list[dict], **kwargs: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    rendered, _ = render_jinja_template(
        [messages], chat_template=template, **({"add_generation_prompt": True} | kwargs), **tokens
    )
    return rendered[0]


@pytest.mark.parametrize(
    "messages", [[USER], [SYSTEM, USER], [SYSTEM, USER, ASSISTANT, USER], [USER, ASSISTANT]]
)
@pytest.mark.parametrize("generate", [True, False])
def test_default_model_equals_transformers(messages: list[dict], generate: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = resolve("smollm2").folder
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    expected = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generate
    )
    ours = ChatTemplate.load(folder).render(messages, add_generation_prompt=generate)
    assert ours == expected
    has_default_system = "You are a helpful AI assistant named SmolLM" in ours
    assert has_default_system is (messages[0] is not SYSTEM)


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}\n  {% if m.role == 'user' %}\n[{{ m.content | trim }}]"
    "\n  {% else %}\n    {% continue %}\n  {% endif %}\n{% endfor %}{{ eos_token }}",
    "{% if tools %}{{ tools | tojson(indent=2) }}{{ tools[0] | tojson }}{% endif %}ok",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if ns.n > 1 %}{% break %}{% endif %}{{ m['content'] }}{% endfor %}{{ documents is none }}",
    "{% if missing is defined %}x{% endif %}{{ missing }}{{ pad_token }}|",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_environment_equals_transformers(
    tmp_path: Path, template: str, tools: list[dict] | None
) -> None:
    messages = [SYSTEM, USER, ASSISTANT]
    loaded = ChatTemplate.load(write(tmp_path, template))
    if tools and not loaded.knowing_tools:
        pytest.skip("what transformers does not show to the model at all, we do: below")
    assert loaded.render(messages, tools) == theirs(template, messages, tools=tools)


CALLING = [
    Message("user", "Weather in Paris and Rome?"),
    Message(
        "assistant",
        None,
        tool_calls=(
            ToolCall("call_one_", "f", {"city": "Paris"}),
            ToolCall("call_two_", "f", {"city": "R\u00f6m"}),
        ),
    ),
    Message("tool", "rain", tool_call_id="call_one_"),
    Message("tool", "sun", tool_call_id="call_two_"),
]
# Qwen's, shortened: it renders definitions, calls and results.
KNOWS_TOOLS = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function.name }} "
    "{{ call.function.arguments | tojson }} {{ call.function.arguments.city }}</tool_call>"
    "{% endfor %}{{ m.tool_call_id }}{% endfor %}"
)


def test_calls_and_results_equal_transformers(tmp_path: Path) -> None:
    loaded = ChatTemplate.load(write(tmp_path, KNOWS_TOOLS))
    assert loaded.knowing_tools == {"default"}
    ours = loaded.render(template_messages(CALLING), TOOLS)
    assert ours == theirs(KNOWS_TOOLS, template_messages(CALLING), tools=TOOLS)
    assert '<tool_call>f {"city": "R\u00f6m"} R\u00f6m</tool_call>' in ours


ADDS_STRINGS = (
    "{% for m in messages %}{% for call in m.tool_calls %}"
    "{{ call.function.name + '(' + call.function.arguments + ')' }}{% endfor %}{% endfor %}"
)
WALKS = (
    "{% for m in messages %}{% for call in m.tool_calls %}{{ call.function.name }}("
    "{% for name, value in call.function.arguments | items %}{{ name }}={{ value }};{% endfor %})"
    "{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (ADDS_STRINGS, 'f({"city": "Paris"})f({"unparsed": "{\\"city"})'),
        (WALKS, 'f(city=Paris;)f(unparsed={"city;)'),
        (KNOWS_TOOLS, '{"unparsed": "{\\"city"}'),
    ],
)
def test_a_call_that_was_cut_off_is_rendered(tmp_path: Path, template: str, written: str) -> None:
    calls = [pb.ToolCall(name="f", arguments=a) for a in ('{"city": "Paris"}', '{"city')]
    message = Message("assistant", None, tool_calls=check_tool_calls("c", calls))
    loaded = ChatTemplate.load(write(tmp_path, "{% if tools %}{% endif %}" + template))
    assert written in loaded.render(template_messages([message]))


NINE = (
    "{% for m in messages %}{% for call in m.tool_calls %}{% if call.id is undefined or "
    "call.id | length != 9 %}{{ raise_exception('ids!') }}{% endif %}={{ call.id }}{% endfor %}"
    "{% if m.role == 'tool' %}{% if m.tool_call_id is undefined or m.tool_call_id | length != 9 %}"
    "{{ raise_exception('ids!') }}{% endif %}?{{ m.tool_call_id }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("call_id", ["call_9hHDFg7aKqjQ", "", "aB3dE6gH9"])
def test_call_ids_of_other_servers_are_converted_for_mistral(tmp_path: Path, call_id: str) -> None:
    messages = [
        Message("assistant", None, tool_calls=(ToolCall(call_id, "f", {}),)),
        Message("tool", "x", tool_call_id=call_id),
    ]
    loaded = ChatTemplate.load(write(tmp_path, "{% if tools %}{% endif %}" + NINE))
    prompt = loaded.render(template_messages(messages, MISTRAL))
    called, _, answered = prompt.removeprefix("=").partition("?")
    assert called == answered


@pytest.mark.parametrize("knows", [False, True])
def test_developer_is_system_in_templates_without_it(tmp_path: Path, knows: bool) -> None:
    template = GENERIC + ("{# system, developer #}" if knows else "")
    loaded = ChatTemplate.load(write(tmp_path, template))
    prompt = loaded.render(template_messages([Message("developer", "rules")]))
    assert prompt == ("<developer>rules</developer>" if knows else "<system>rules</system>")


GENERIC = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"


def test_a_template_without_tools_gets_them_in_the_system_message(tmp_path: Path) -> None:
    loaded = ChatTemplate.load(write(tmp_path, GENERIC))
    assert not loaded.knowing_tools
    prompt = loaded.render([SYSTEM, *template_messages(CALLING)], TOOLS, tool_format=HERMES)
    head, _, rest = prompt.partition("</system>")
    assert head.startswith("<system>You are terse.\n\n")
    assert f"<tools>\n{json.dumps(TOOLS[0], ensure_ascii=False)}\n</tools>" in head
    assert '<tool_call>\n{"name": "<name>", "arguments": <arguments as a JSON object>}' in head
    assert rest == (
        "<user>Weather in Paris and Rome?</user>"
        '<assistant><tool_call>\n{"name": "f", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "f", "arguments": {"city": "R\u00f6m"}}\n</tool_call></assistant>'
        "<user><tool_response>\nrain\n</tool_response>\n"
        "<tool_response>\nsun\n</tool_response></user>"
    )


def test_tools_add_a_system_message_if_there_is_none(tmp_path: Path) -> None:
    loaded = ChatTemplate.load(write(tmp_path, GENERIC))
    prompt = loaded.render([USER], TOOLS, tool_format=MISTRAL)
    assert prompt.startswith("<system>You can call functions.")
    assert '[TOOL_CALLS][{"name": "<name>"' in prompt
    assert loaded.render([USER]) == f"<user>{USER['content']}</user>"


def test_places_of_a_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InvalidRequest, match=r"messages: .*no chat template"):
        ChatTemplate.load(tmp_path).render([USER])
    write(tmp_path, "inside")
    assert ChatTemplate.load(tmp_path).render([USER]) == "inside"
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write(tmp_path, named)
    assert ChatTemplate.load(tmp_path).render([USER]) == "d"
    assert ChatTemplate.load(tmp_path).render([USER], TOOLS) == "t"
    (tmp_path / "chat_template.jinja").write_text("file {{ bos_token }}")
    assert ChatTemplate.load(tmp_path).render([USER], TOOLS) == "file <s>"


def test_clock_is_injected(tmp_path: Path) -> None:
    write(tmp_path, "{{ strftime_now('%d %b %Y') }}")
    template = ChatTemplate.load(tmp_path, now=lambda: datetime(2031, 2, 3))
    assert template.render([USER]) == "03 Feb 2031"


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0]['nothing']['more'] }}", "nothing"),
        ("{{ 'a' + messages[0]['number'] }}", "template failed"),
        ("{{ messages[0].content.encode().x() }}", "x"),
        ("{{ 1 / 0 }}", "template failed"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_template_errors_are_invalid_requests(tmp_path: Path, template: str, named: str) -> None:
    loaded = ChatTemplate.load(write(tmp_path, template))
    with pytest.raises(InvalidRequest, match=named) as error:
        loaded.render([USER | {"number": 1}])
    assert error.value.field == "messages"


def test_a_broken_template_does_not_stop_the_start(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "{% if %}"}]
    with structlog.testing.capture_logs() as lines:
        loaded = ChatTemplate.load(write(tmp_path, named))
    assert "tool_use" in str(lines), "a log line names it"
    assert loaded.render([USER]) == "d"
    with pytest.raises(InvalidRequest, match=r"template 'tool_use' cannot be used.*use Generate"):
        loaded.render([USER], TOOLS)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match=r"chat_template\.jinja"):
        ChatTemplate.load(tmp_path).render([USER])
    for odd in ([{"template": "no name"}], 7, [1], {"default": 3}):
        with pytest.raises(InvalidRequest, match="no chat template"):
            fresh = tmp_path / "odd"
            fresh.mkdir(exist_ok=True)
            ChatTemplate.load(write(fresh, odd)).render([USER])


GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}\n  {% generation %}\n{{ m.content }}"
    "\n  {% endgeneration %}\n{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{%- generation -%} {% set x = 1 %}{{ x }} {%- endgeneration -%}{{ x is defined }}"
)


def test_a_template_that_recurses_refuses_deep_nesting(tmp_path: Path) -> None:
    source = (
        "{% macro m(x) %}{% for k in x %}{{ m(x[k]) }}{% endfor %}{% endmacro %}{{ m(tools[0]) }}"
    )
    nested: dict[str, Any] = {}
    for _ in range(600):
        nested = {"a": nested}
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        ChatTemplate.load(write(tmp_path, source)).render([USER], [nested])


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (
            "{% for i in range(9999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
            " s of",
        ),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% set x = 1 %}{% endfor %}"
            "{% endfor %}",
            " s of",
        ),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            "{{ f(60) }}",
            " s of",
        ),
        ("{% for m in messages %}{{ 'x' * m.content | int }}{% endfor %}", "characters"),
        (
            "{% set ns = namespace(t='xy') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}"
            "{% endfor %}",
            "characters",
        ),
        (
            "{% set ns = namespace(t='xy') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}"
            "{% endfor %}",
            "characters",
        ),
        ("{% for i in range(99999) %}{{ 'x' * 60000000 }}{% endfor %}", "characters"),
        ("{% for i in range(99999) %}{{ 9 ** (9 ** 9) }}{% endfor %}", "characters"),
        *[
            ("{% set n = messages[0].content | int %}{{ " + expression + " }}", "characters")
            for expression in (
                "'%999999999s' % n",
                "'%.999999999f' % n",
                "'%*d' % (n, 1)",
                "'%999999999s' | format(n)",
                "'{:>999999999}'.format(n)",
                "'{:{}}'.format(1, n)",
                "'{:{w}}'.format_map({'w': n})",
                "'x'.center(n)",
                "'x'.ljust(n)",
                "'x'.zfill(n)",
                "'a\tb'.expandtabs(n)",
                "('x' * 9999).replace('x', 'y' * 9999)",
                "('x' * 9999) | replace('x', 'y' * 9999)",
                "'x' | center(n)",
                "['x', 'y'] | map('center', n) | list",
                "'a\nb' | indent(n)",
                "('a\n' * 9999) | indent(width=9999)",
                "('a' * 9999) | wordwrap(1, wrapstring='y' * 9999)",
                "range(99999) | join('y' * 9999)",
                "('y' * 9999).join(['z'] * 9999)",
                "[1] | batch(n, 0) | list",
                "[1] | slice(n) | list",
                "([1] * n) | length",
                "3 | round(n, 'ceil')",
                "[[1]] | tojson(indent=n)",
            )
        ],
        (
            "{% set ns = namespace(t=[1]) %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}"
            "{% endfor %}",
            " s of|characters",
        ),
        ("{{ ([[1] * 9999] * 999) | tojson(indent=99) }}", " s of|characters"),
    ],
)
def test_an_endless_template_fails_its_request(
    tmp_path: Path, template: str, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where the size must end it, a slow machine's time must not.
    monkeypatch.setattr(template_budget, "RENDER_S", 4.0 if named == "characters" else 0.2)
    chat = ChatTemplate.load(write(tmp_path, template))
    begun_s = time.thread_time()
    with pytest.raises(InvalidRequest, match=named) as error:
        chat.render([USER | {"content": "90000000"}])
    assert error.value.field == "messages"
    assert time.thread_time() - begun_s < 5


def test_loop_variables_work_in_counted_loops(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}"
        "{{ loop.revindex }}{{ loop.previtem is defined }}|{% endfor %}"
        "{% for k, v in messages[0].items() if v != 'user' %}{{ k }}{{ v }}{% endfor %}"
        "{% for x in nothing %}{{ x }}{% else %}none{% endfor %}"
        "{% for x in [1, [2, 3]] recursive %}"
        "{{ loop(x) if x is iterable else x * loop.depth }}{% endfor %}"
    )
    messages = [USER, ASSISTANT, USER]
    chat = ChatTemplate.load(write(tmp_path, template))
    assert chat.render(messages) == theirs(template, messages)


def test_generation_blocks_are_rendered(tmp_path: Path) -> None:
    messages = [SYSTEM, USER, ASSISTANT]
    loaded = ChatTemplate.load(write(tmp_path, GENERATION))
    assert loaded.render(messages) == theirs(GENERATION, messages)


@pytest.mark.parametrize(
    "expression",
    [
        "messages | tojson",
        "messages | tojson(indent=2)",
        "messages | tojson(ensure_ascii=True)",
        "messages | tojson(sort_keys=True, separators=(',', ':'))",
        "'a' ~ messages[0].content ~ 1",
        "messages | map(attribute='content') | join(', ')",
        "messages | map(attribute='role') | list",
        "messages[1].content | safe ~ '<' ",
        "messages[1].content | e",
        "'%s!' | format(1)",
        "messages[0].content | trim | upper | replace('A', 'b')",
        "namespace(a=1).a ~ none",
        "messages | selectattr('role', 'equalto', 'user') | list | length",
        "tools is none",
        "(messages | first).content[::-1] ~ (messages | last).content[:2]",
        "'x' if tools else 'y'",
    ],
)
def test_expressions_equal_transformers(tmp_path: Path, expression: str) -> None:
    template = "{{ " + expression + " }}"
    messages = [SYSTEM, USER, ASSISTANT]
    assert ChatTemplate.load(write(tmp_path, template)).render(messages) == theirs(
        template, messages
    )


def test_a_template_without_system_messages_gets_tools_too(tmp_path: Path) -> None:
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + GENERIC
    )
    loaded = ChatTemplate.load(write(tmp_path, refuses))
    prompt = loaded.render([USER], TOOLS)
    assert prompt.startswith("<user>You can call functions.")
    assert prompt.endswith(f"\n\n{USER['content']}</user>")
    with pytest.raises(InvalidRequest, match="no system"):
        loaded.render([SYSTEM, USER], TOOLS)


def test_further_templates_in_their_folder(tmp_path: Path) -> None:
    extra = tmp_path / "additional_chat_templates"
    extra.mkdir()
    (extra / "tool_use.jinja").write_text("t {{ tools | length }}")
    (extra / "rag.jinja").write_text("r")
    write(tmp_path, "inside")
    loaded = ChatTemplate.load(tmp_path)
    assert (loaded.render([USER]), loaded.render([USER], TOOLS)) == ("inside", "t 1")
    (tmp_path / "chat_template.jinja").write_text("file")
    loaded = ChatTemplate.load(tmp_path)
    assert (loaded.render([USER]), loaded.render([USER], TOOLS)) == ("file", "t 1")


def test_fallback_places_of_a_template_and_its_tokens(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ eos_token }}!"}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}})
    )
    assert ChatTemplate.load(tmp_path).render([USER]) == "</s>!"
    write(tmp_path, {"default": "config", "tool_use": "config t"}, eos_token="<e>")
    loaded = ChatTemplate.load(tmp_path)
    assert (loaded.render([USER]), loaded.render([USER], TOOLS)) == ("config", "config t")


def test_a_template_that_does_not_compile_is_reported_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}\n{% for m in messages %}\n{% if %}"
    )
    template = ChatTemplate.load(tmp_path)
    with pytest.raises(InvalidRequest, match=r"cannot be used \(line 3: Expected an expression"):
        template.render([{"role": "user", "content": "x"}])
