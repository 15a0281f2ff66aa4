"""Tool calls: their options, the form of each family, the parser, and the grammar of the
output.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from functools import cache

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.api.grpc.requests import read_request
from coordinator.api.validation.tools import check_tool_calls, check_tools, text_schema, tool_use
from coordinator.api.values import Constraint
from coordinator.generation.events import Ending
from coordinator.generation.output import Output
from coordinator.text.served_model import Limits
from coordinator.text.tokenizer import Tokenizer
from coordinator.text.tools.format import ToolFormat, ToolUse
from coordinator.text.tools.forms import FORMATS
from coordinator.text.tools.grammar import tool_grammar
from coordinator.text.tools.json_forms import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS
from coordinator.text.tools.parser import ToolCalls, call_id
from coordinator.text.values import Message
from engine.base.errors import InvalidRequest, NotOffered
from engine.base.option_groups import FrontOptions
from engine.base.types import FinishReason
from engine.checkpoint.source import resolve
from engine.constraints.schemas import ESCAPES, WHITE_SPACE
from engine.pb.diptych.v1 import inference_pb2 as pb
from tests.support.validated import validated

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ADD = {"type": "function", "function": {"name": "add", "strict": True}}
TOOLS = check_tools("tools_json", json.dumps([WEATHER, ADD]))
EVERY = list(FORMATS.values())
ONE_A_KIND = [HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS]
UNMARKED = [form for form in EVERY if not form.text_begin]  # text stands there without a marker
ONE_A_KIND += [FORMATS[name] for name in ("glm", "lfm2", "kimi_k2")]
AUTO, REQUIRED = pb.ToolChoice.MODE_AUTO, pb.ToolChoice.MODE_REQUIRED


def use(form: ToolFormat, mode: int = AUTO, **fields) -> ToolUse:
    request = pb.ChatRequest(tool_choice=pb.ToolChoice(mode=mode), **fields)
    found = tool_use(read_request(request), TOOLS, form)
    assert found
    return found


def read(
    form: ToolFormat, pieces, *, is_cut: bool = False, mode: int = AUTO
) -> tuple[str, list[tuple[str, str]]]:
    """(text, [(name, arguments)]) of an output in `pieces`."""
    parser = ToolCalls(use(form, mode), lambda i, name: f"id{i}")
    parsed = [*map(parser.push, pieces), parser.flush(is_cut), parser.flush(is_cut)]
    calls = [call for each in parsed for call in each.pieces]
    assert [call.index for call in calls] == list(range(parser.num_calls))
    assert [call.id for call in calls] == [f"id{call.index}" for call in calls]
    return "".join(each.text for each in parsed), [(call.name, call.arguments) for call in calls]


def num_closing(form: ToolFormat) -> int:
    """Characters after the last call, which is complete without them."""
    return len(form.closing)


ARGUMENTS = ['{"city": "a \\"b\\" } ] \\\\"}', "{}", '{"x": [{"y": "]}"}, [1, 2]], "z": null}']


@pytest.mark.parametrize("form", EVERY, ids=lambda f: f.name)
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_written_call_is_parsed(form, arguments, size):
    calls = [("get_weather", arguments)]
    if not form.single:
        calls.append(("add", "{}"))
    text = form.write(calls) + "\n"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert read(form, pieces) == ("", calls)


@pytest.mark.parametrize("form", [HERMES, MISTRAL, MISTRAL_ARGS], ids=lambda f: f.name)
def test_text_before_and_after_calls(form):
    written = form.write([("add", '{"a": 1}')])
    assert read(form, [f"I look. {written}"]) == ("I look. ", [("add", '{"a": 1}')])
    assert read(form, [f"{written}\nDone."])[0] == "\nDone."


@pytest.mark.parametrize("form", EVERY, ids=lambda f: f.name)
@pytest.mark.parametrize(
    "text",
    [
        "Just text, {braces} and <tags>.",
        "<tool_cal",
        "[TOOL_",
        '{"name": "absent", "parameters": {}}',
        '<tool_call>\n{"name": "absent", "arguments": {}}\n</tool_call>',
        "[TOOL_CALLS]absent[ARGS]{}",
        '[TOOL_CALLS][{"nome": "add"}]',
        "<tool_call>\nfor example",
        "",
        "\n \n",
    ],
)
def test_text_that_is_no_call(form, text):
    assert read(form, list(text)) == (text, [])
    assert read(form, [text]) == (text, [])


def test_white_space_is_free():
    loose = '<tool_call>{ "name" :\n "add" , "arguments":\t{"a" : 1} }</tool_call>'
    assert read(HERMES, list(loose)) == ("", [("add", '{"a" : 1}')])
    assert read(LLAMA3, list(' {"name": "add","parameters":{}}\n')) == ("", [("add", "{}")])
    assert read(LLAMA3, ['<|python_tag|>{"name": "add", "parameters": {}}'])[1] == [("add", "{}")]


@pytest.mark.parametrize("form", EVERY, ids=lambda f: f.name)
@pytest.mark.parametrize("mode", [AUTO, REQUIRED])
def test_a_call_is_released_at_its_end_and_not_if_cut_off(form, mode):
    calls = [("get_weather", '{"city": "Par \\"}"}')]
    if not form.single:
        calls.append(("add", '{"a": [1]}'))
    whole = form.write(calls)
    ends = [len(form.write(calls[: i + 1])) - num_closing(form) for i in range(len(calls))]
    for cut in range(len(whole) + 1):
        announced = calls[: sum(end <= cut for end in ends)]
        text, found = read(form, list(whole[:cut]), is_cut=True, mode=mode)
        assert (text, found) == ("", announced), whole[:cut]
        assert read(form, [whole[:cut]], is_cut=True, mode=mode) == ("", announced)


@pytest.mark.parametrize("form", [HERMES, MISTRAL, MISTRAL_ARGS], ids=lambda f: f.name)
def test_text_before_a_cut_off_call_is_released(form):
    whole = form.write([("add", '{"a": 1}')])
    for cut in range(len(whole) - num_closing(form)):
        assert read(form, ["I look. ", whole[:cut]], is_cut=True) == ("I look. ", [])


@pytest.mark.parametrize("form", EVERY, ids=lambda f: f.name)
def test_an_output_that_ends_within_a_call(form):
    whole = form.write([("get_weather", '{"city": "Par"}')])
    before = whole[: whole.index("weather")]
    assert read(form, list(before)) == (before, [])  # without a name it is text
    assert read(form, list(whole[: whole.index("Par")])) == (
        "",
        [],
    )  # cut off
    if form.body.is_json:
        closed = whole[: whole.index("}", whole.index("Par")) + 1]  # complete arguments: a call
        assert read(form, list(closed)) == ("", [("get_weather", '{"city": "Par"}')])


@pytest.mark.parametrize("form", [HERMES, MISTRAL, MISTRAL_ARGS], ids=lambda f: f.name)
def test_an_incomplete_second_call_is_no_text(form):
    calls = [("add", '{"a": 1}'), ("get_weather", "{}")]
    whole = form.write(calls)
    first = len(form.write(calls[:1])) - num_closing(form)
    for end in range(first, whole.index("weather")):
        assert read(form, list(whole[:end])) == ("", calls[:1]), whole[:end]


@pytest.mark.parametrize("form", EVERY, ids=lambda f: f.name)
def test_what_is_content(form):
    parser = ToolCalls(use(form), lambda i, name: str(i))
    assert parser.is_content("~")
    assert not parser.is_content(form.write([("add", "{}")]))
    whole = form.write([("get_weather", '{"city": "Par"}')])
    begun = len(form.trigger) or 1
    end = len(whole) - num_closing(form)
    for i, char in enumerate(whole):
        assert parser.is_content("~") == (i < begun), whole[:i]
        assert parser.is_in_call == (i >= begun), whole[:i]
        if i == end:
            break
        parser.push(char)
    if not form.once:  # several calls have an end
        assert parser.is_content("~")


@settings(max_examples=300)
@given(
    form=st.sampled_from(EVERY),
    parts=st.lists(
        st.one_of(
            st.sampled_from(
                [
                    "<tool_call>",
                    "</tool_call>",
                    "[TOOL_CALLS]",
                    "[ARGS]",
                    '{"name": "add", "arguments": {"a": 1}}',
                    '{"name": "',
                    "add",
                    '", "parameters": ',
                    "{}",
                    "]",
                    ", ",
                    "\n",
                ]
            ),
            st.text(max_size=3),
        ),
        max_size=12,
    ),
    cuts=st.lists(st.integers(1, 5), max_size=60),
)
def test_the_grouping_into_messages_changes_nothing(form, parts, cuts):
    text = "".join(parts)
    pieces, at = [], 0
    for cut in cuts:
        pieces.append(text[at : at + cut])
        at += cut
    pieces.append(text[at:])
    assert read(form, pieces) == read(form, list(text))


@pytest.mark.parametrize("form", ONE_A_KIND, ids=lambda f: f.name)
@pytest.mark.parametrize("place", ["text", "call", "begin", "name"])
def test_time_is_linear_in_the_held_text(form, place):
    """A copy of the held text for each character would take 16 times as long."""
    opened = form.trigger + form.opening
    before = {
        "text": "",
        "call": form.write([("add", "{}")]),
        "begin": opened + form.body.begin[:3],
        "name": opened + form.body.begin,
    }[place]

    def took_s(size):
        parser = ToolCalls(use(form), lambda i, name: str(i))
        begun_s = time.thread_time()
        parser.push(before + ("a" if place == "name" else "\n") * size)
        parser.flush(is_cut=False)
        return time.thread_time() - begun_s

    assert min(took_s(80_000) for _ in range(2)) < 9 * min(took_s(20_000) for _ in range(3)) + 0.05


def test_call_ids_do_not_depend_on_the_worker():
    assert call_id("request/0", HERMES, 1, "f") == call_id("request/0", HERMES, 1, "f")
    ids = {
        call_id(f"request/{choice}", HERMES, call, "f") for choice in range(3) for call in range(3)
    }
    assert len(ids) == 9
    assert all(i.startswith("call_") for i in ids)
    assert len(call_id("r/0", MISTRAL, 0, "f")) == 9  # Mistral's templates need nine


def test_the_option_has_all_families():
    (field,) = [f for f in FrontOptions.__dataclass_fields__.values() if f.name == "tool_format"]
    assert set(field.metadata["choices"]) == {"auto", "none", *FORMATS}


LIMITS = Limits("m", 100, (2,), 1000)


def chat(**fields) -> pb.ChatRequest:
    fields.setdefault("tools_json", json.dumps([WEATHER, ADD]))
    return pb.ChatRequest(messages=[pb.Message(role="user", content="x")], **fields)


def test_auto_is_the_default_with_tools():
    got = validated(chat(), LIMITS)
    assert got.tools
    assert set(got.tools.by_name) == {"get_weather", "add"}
    assert not got.tools.required
    assert got.constraint == tool_grammar(got.tools)
    assert validated(chat(tools_json=""), LIMITS).tools is None
    none = pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE)
    assert validated(chat(tool_choice=none), LIMITS).tools is None
    assert validated(chat(tool_choice=none, tools_json=""), LIMITS).tools is None


def test_choices():
    assert use(HERMES, REQUIRED).required
    named = tool_use(read_request(chat(tool_choice=pb.ToolChoice(name="add"))), TOOLS, HERMES)
    assert named
    assert (set(named.by_name), named.required, named.single) == ({"add"}, True, True)
    assert len(named.tools) == 2  # the prompt shows all
    assert not use(HERMES).single
    assert use(HERMES, parallel_tool_calls=False).single
    assert use(LLAMA3, parallel_tool_calls=True).single


BAD_TOOLS = [
    ("{}", "tools_json"),
    ("nonsense", "tools_json"),
    ("[NaN]", "tools_json"),
    ("[" * 5000, "tools_json"),
    ("[1]", "tools_json[0]"),
    ('[{"type": "magic"}]', "tools_json[0].type"),
    ('[{"type": "function"}]', "tools_json[0].function"),
    ('[{"type": "function", "function": {}}]', "tools_json[0].function.name"),
    ('[{"type": "function", "function": {"name": "a b"}}]', "tools_json[0].function.name"),
    (json.dumps([ADD, ADD]), "tools_json[1].function.name"),
    (json.dumps([ADD] * 129), "tools_json"),
    (" " * 2_000_000, "tools_json"),
]
BAD_PARTS = {"parameters": 5, "description": [], "strict": "yes"}


@pytest.mark.parametrize(("source", "field"), BAD_TOOLS, ids=range(len(BAD_TOOLS)))
def test_definitions_are_checked(source, field):
    with pytest.raises(InvalidRequest) as caught:
        validated(chat(tools_json=source), LIMITS)
    assert caught.value.field == field


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_that_is_no_double_is_refused_with_its_field(number):
    parameters = f'{{"maximum": {number}}}'
    source = '[{"type": "function", "function": {"name": "f", "strict": true, "parameters": %s}}]'
    with pytest.raises(InvalidRequest, match="not JSON") as caught:
        check_tools("t", source % parameters)
    assert caught.value.field == "t[0].function.parameters"
    lax = source.replace("true", "false") % f'{{"maximum": {number}, "minProperties": 0}}'
    (tool,) = check_tools("t", lax)
    assert "maximum" not in tool.schema and "minProperties" in tool.schema
    found = tool_use(read_request(chat()), check_tools("t", json.dumps([ADD])), HERMES)
    with pytest.raises(InvalidRequest, match="not JSON") as caught:
        text_schema(Constraint("json_schema", parameters), found)
    assert caught.value.field == "constraint.json_schema"


@pytest.mark.parametrize("kind", ["string", "array", ["string", "null"], None, 5, "any"])
def test_parameters_that_are_no_object_are_refused(kind):
    """An unknown type is an error only for strict tools."""
    function = {"name": "f", "parameters": {"type": kind}, "strict": True}
    for strict in (True, False):
        function["strict"] = strict
        tool = {"type": "function", "function": function}
        if kind in (None, 5, "any") and not strict:
            assert json.loads(check_tools("t", json.dumps([tool]))[0].schema)["type"] == "object"
            continue
        with pytest.raises(InvalidRequest, match="object") as caught:
            check_tools("t", json.dumps([tool]))
        assert caught.value.field == "t[0].function.parameters.type"


@pytest.mark.parametrize("part", BAD_PARTS)
def test_parts_of_definitions_are_checked(part):
    tool = {"type": "function", "function": {"name": "f", part: BAD_PARTS[part]}}
    with pytest.raises(InvalidRequest) as caught:
        check_tools("t", json.dumps([tool]))
    assert caught.value.field == f"t[0].function.{part}"


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tool_choice": pb.ToolChoice(name="absent")}, "tool_choice.name"),
        ({"tool_choice": pb.ToolChoice(mode=9)}, "tool_choice.mode"),
        ({"tool_choice": pb.ToolChoice(name="add"), "tools_json": ""}, "tool_choice"),
    ],
)
def test_choices_are_checked(fields, field):
    with pytest.raises(InvalidRequest) as caught:
        validated(chat(**fields), LIMITS)
    assert caught.value.field == field


def test_arguments_of_earlier_calls_are_objects():
    call = pb.ToolCall(id="i", name="f", arguments='{"a": [1]}')
    turns = [
        pb.Message(role="assistant", tool_calls=[call]),
        pb.Message(role="tool", content="r", tool_call_id="i"),
    ]
    got = validated(pb.ChatRequest(messages=turns), LIMITS)
    assert got.messages
    first, second = got.messages
    assert first.content is None
    assert first.tool_calls[0].arguments == {"a": [1]}
    assert second == Message("tool", "r", tool_call_id="i")
    assert check_tool_calls("c", [pb.ToolCall(name="f")])[0].arguments == {}
    with pytest.raises(InvalidRequest) as caught:
        check_tool_calls("c", [pb.ToolCall(arguments="{}")])
    assert caught.value.field == "c[0].name"


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ("", {}),
        (" \n", {}),
        ("null", {}),
        ("[]", {}),
        ("{}", {}),
        ('{"a": null}', {"a": None}),
        ("[1]", {"unparsed": [1]}),
        ("0", {"unparsed": 0}),
        ("false", {"unparsed": False}),
        ('"Paris"', {"unparsed": "Paris"}),
        ('{"city": "Par', {"unparsed": '{"city": "Par'}),
        ("{'city': 'Paris'}", {"unparsed": "{'city': 'Paris'}"}),
        ('{"a": NaN}', {"unparsed": '{"a": NaN}'}),
        ('{"a": 1e999}', {"unparsed": '{"a": 1e999}'}),
        ('{"a": "\\ud800"}', {"unparsed": '{"a": "\\ud800"}'}),
        ("[" * 100_000, {"unparsed": "[" * 100_000}),
        ("[" * 600 + "]" * 600, {"unparsed": "[" * 600 + "]" * 600}),
        ("9" * 5000, {"unparsed": "9" * 5000}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_arguments_of_any_kind_become_an_object(written, arguments):
    (call,) = check_tool_calls("c", [pb.ToolCall(name="f", arguments=written)])
    assert call.arguments == arguments


def test_a_definition_nested_too_deeply_is_refused():
    schema = '{"a":' * 600 + "1" + "}" * 600
    tool = f'[{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}]'
    with pytest.raises(InvalidRequest, match="nested deeper than 100") as caught:
        check_tools("tools_json", tool)
    assert caught.value.field == "tools_json"


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_call_ids_have_the_form_of_the_family(form):
    assert form.call_id("aB3dE6gH9") == "aB3dE6gH9"
    for other in ("call_9hHDFg7aKqjQ", "call_one_", ""):
        made = form.call_id(other)
        assert made == form.call_id(other)
        assert made == other if form.id_chars > 9 else (len(made) == 9 and made.isalnum())


@pytest.mark.parametrize("source", ["", "[]", "null", " [ ] "])
def test_an_empty_list_of_tools_is_none(source):
    unspecified, none, auto = pb.ToolChoice(), pb.ToolChoice(mode=1), pb.ToolChoice(mode=2)
    for choice in (unspecified, none, auto):
        got = validated(chat(tools_json=source, tool_choice=choice), LIMITS)
        assert got.tools is None
        assert got.constraint is None
    for choice in (pb.ToolChoice(mode=3), pb.ToolChoice(name="f")):
        with pytest.raises(InvalidRequest) as caught:
            validated(chat(tools_json=source, tool_choice=choice), LIMITS)
        assert caught.value.field == "tool_choice"


def test_a_schema_for_text_beside_tools():
    schema = Constraint("json_schema", '{"type": "string"}')
    held = json.loads(text_schema(schema, use(HERMES)) or "")
    options = {"json_allowed_escapes": ESCAPES, "whitespace_pattern": WHITE_SPACE}
    assert held == {"type": "string", "x-guidance": options}
    assert text_schema(schema, use(HERMES, REQUIRED)) is None
    assert text_schema(None, use(HERMES)) is None
    with pytest.raises(InvalidRequest, match="json_schema"):
        text_schema(Constraint("json_schema", "["), use(HERMES))
    with pytest.raises(NotOffered, match="regex"):
        text_schema(Constraint("regex", "a"), use(HERMES))
    with pytest.raises(NotOffered, match="bare JSON"):
        text_schema(schema, use(LLAMA3))


# Calls from tokens

MARKER = re.compile(r'\]<\]minimax\[>\[|</?[|｜]?[\w:▁｜"]{2,}[|｜]?>|<\|"\|>|\[[A-Z_]+\]')


def markers_of(form: ToolFormat) -> list[str]:
    return list(dict.fromkeys(MARKER.findall(form.sample)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve("smollm2").folder)


@pytest.fixture(scope="module")
def marked(tokenizer: Tokenizer) -> Tokenizer:
    """The same with every family's markers as special tokens."""
    spec = json.loads(tokenizer.library.to_str())
    first = tokenizer.library.get_vocab_size()
    markers = dict.fromkeys(m for form in EVERY for m in markers_of(form))
    for i, content in enumerate(markers):
        spec["added_tokens"].append(
            {**spec["added_tokens"][0], "id": first + i, "content": content}
        )
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    special = frozenset(t["id"] for t in spec["added_tokens"])
    return replace(tokenizer, library=library, special_ids=special, _pieces={})


def answer_of(tokenizer: Tokenizer, form: ToolFormat, **fields) -> Output:
    request = chat(request_id="r", **fields)
    limits = replace(LIMITS, vocab_size=60_000, tool_format=form)
    answer = Output(tokenizer, validated(request, limits), max_tokens=500, min_tokens=0)
    list(answer.catch_up())
    return answer


@pytest.mark.parametrize("form", EVERY, ids=lambda f: f.name)
@pytest.mark.parametrize("markers", [False, True], ids=["plain", "tokens"])
def test_calls_are_read_from_tokens_and_after_a_resume(tokenizer, marked, form, markers):
    if markers:
        tokenizer = marked
        form = form.bound(tokenizer)
        assert set(form.tokens) == set(markers_of(form))
    text = form.write([("get_weather", '{"city": "Zürich \U0001f600"}')])
    tokens = [*tokenizer.encode(text), 2]
    whole = answer_of(tokenizer, form)
    chunks = [whole.push([token]) for token in tokens]
    assert whole.ending
    assert whole.ending.reason is FinishReason.STOP
    assert not "".join(c.text for c in chunks)
    pieces = [piece for c in chunks for piece in c.tool_calls]
    assert pieces[0].name == "get_weather"
    assert "".join(p.arguments for p in pieces) == '{"city": "Zürich \U0001f600"}'
    # Another coordinator, which got the first tokens by `resume`, sends the rest.
    for cut in range(len(tokens)):
        later = answer_of(tokenizer, form, resume=[pb.Resume(token_ids=tokens[:cut])])
        assert [later.push([token]) for token in tokens[cut:]] == chunks[cut:]
    # Messages of several tokens give the same.
    assert answer_of(tokenizer, form).push(tokens).tool_calls[0].id == pieces[0].id


@pytest.mark.parametrize("form", EVERY, ids=lambda f: f.name)
@pytest.mark.parametrize("markers", [False, True], ids=["plain", "tokens"])
@pytest.mark.parametrize("choice", ["auto", "required", "named"])
def test_stops_do_not_act_inside_calls(tokenizer, marked, form, markers, choice):
    if markers:
        tokenizer = marked
        form = form.bound(tokenizer)
    elif not form.sample.isascii():
        pytest.skip("this vocabulary splits its markers within a character")
    chosen = {
        "auto": pb.ToolChoice(mode=AUTO),
        "required": pb.ToolChoice(mode=REQUIRED),
        "named": pb.ToolChoice(name="get_weather"),
    }[choice]
    arguments = '{"city": "stop here"}'
    tokens = tokenizer.encode(form.write([("get_weather", arguments)]))
    words = ["city", "stop", "{", "get", "<", "[", "}", *markers_of(form)]
    stop = pb.Stop(stop=words[:16], stop_token_ids=set(tokens))
    for include in (False, True):
        stop.include_stop_str_in_output = include
        answer = answer_of(tokenizer, form, stop=stop, tool_choice=chosen)
        chunks = [answer.push([token]) for token in tokens]
        assert answer.ending is None
        last = answer.push([2])
        assert answer.ending.matched_token == 2
        assert not "".join(chunk.text for chunk in [*chunks, last])
        (piece,) = [piece for chunk in [*chunks, last] for piece in chunk.tool_calls]
        assert (piece.name, piece.arguments) == ("get_weather", arguments)


@pytest.mark.parametrize("form", [HERMES, MISTRAL_ARGS], ids=lambda f: f.name)
def test_stops_act_on_text_around_calls(tokenizer, form):
    call = form.write([("add", "{}")])
    for text, expected in (("I stop. ", "I "), (f"{call} and stop", " and ")):
        answer = answer_of(tokenizer, form, stop=pb.Stop(stop=["stop"]))
        chunks = [answer.push([token]) for token in tokenizer.encode(text)]
        assert answer.ended_here
        assert answer.ending.matched_text == "stop"
        assert "".join(chunk.text for chunk in chunks) == expected
    # A stop token of the client; an end of sequence is placed by the grammar.
    (full_stop,) = tokenizer.encode(".")
    answer = answer_of(tokenizer, form, stop=pb.Stop(stop_token_ids=[full_stop]))
    chunk = answer.push(tokenizer.encode("I look. "))
    assert chunk.text == "I look"
    assert answer.ended_here
    assert answer.ending.matched_token == full_stop


# The others have markers that this vocabulary splits within a character; theirs have them whole.
PLAIN = [form for form in EVERY if form.sample.isascii()]


@pytest.mark.parametrize("form", PLAIN, ids=lambda f: f.name)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_max_tokens_within_a_call(tokenizer, form, size):
    calls = [("get_weather", '{"city": "Paris"}')]
    if not form.single:
        calls.append(("add", '{"a": 1}'))
    tokens = tokenizer.encode(form.write(calls))
    seen = 0
    for limit in range(1, len(tokens) + 1):
        answer = answer_of(tokenizer, form)
        chunks = [answer.push(tokens[i : min(i + size, limit)]) for i in range(0, limit, size)]
        answer.ending = Ending(FinishReason.LENGTH)  # the worker sets it for constrained outputs
        chunks.append(answer.finish())
        assert not "".join(chunk.text for chunk in chunks)
        found = [(p.name, p.arguments) for chunk in chunks for p in chunk.tool_calls]
        assert found == calls[: len(found)]
        assert len(found) >= seen
        seen = len(found)
    assert seen == len(calls)


# Grammars in llguidance


@cache
def library_of(library: tokenizers.Tokenizer):
    """llguidance's form of it; seconds of computing for each test otherwise."""
    return pytest.importorskip("llguidance").LLTokenizer(library.to_str())


def accepts(tokenizer: Tokenizer, source: str, text: str) -> bool:
    llguidance = pytest.importorskip("llguidance")
    library = library_of(tokenizer.library)
    grammar = llguidance.LLMatcher.grammar_from_lark(source)
    is_bad, messages = llguidance.LLMatcher.validate_grammar_with_warnings(grammar, library)
    assert not is_bad, messages
    matcher = llguidance.LLMatcher(library, grammar)
    tokens = tokenizer.encode(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize("form", UNMARKED, ids=lambda f: f.name)
@pytest.mark.parametrize("markers", [False, True], ids=["plain", "tokens"])
def test_grammars_constrain_the_output(tokenizer, marked, form, markers):
    if markers:
        tokenizer = marked
        form = form.bound(tokenizer)
    one, bad = form.write([("add", "{}")]), form.write([("get_weather", '{"town": "a"}')])
    two = form.write([("get_weather", '{"city": "a"}'), ("add", "{}")])
    several = not form.single

    def allowed(found: ToolUse | None, schema: str | None = None) -> list[bool]:
        assert found
        source = tool_grammar(found, schema).source
        texts = (one, two, bad, "Hello <tool there", "Hello\n" + one, '{"a": 1}', one + " and")
        return [accepts(tokenizer, source, text) for text in texts]

    free = form.trigger != ""  # otherwise calls are whole outputs
    assert allowed(use(form)) == [True, several, False, True, True, True, False]
    assert free or read(form, ["Hello\n" + one])[1] == []
    assert allowed(use(form, REQUIRED)) == [True, several, *[False] * 5]
    assert allowed(use(form, REQUIRED, parallel_tool_calls=False)) == [True, *[False] * 6]
    named = tool_use(read_request(chat(tool_choice=pb.ToolChoice(name="add"))), TOOLS, form)
    assert allowed(named) == [True, *[False] * 6]
    if free:
        schema = '{"type": "object", "properties": {"a": {"type": "integer"}}}'
        assert allowed(use(form), schema) == [True, several, False, False, False, True, False]


def test_lenient_schemas_compile_where_strict_ones_do_not(tokenizer):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"not": {"type": "null"}}}}
    lax = check_tools("t", json.dumps([tool]))
    strict = check_tools(
        "t", json.dumps([{**tool, "function": {**tool["function"], "strict": True}}])
    )
    request = chat(tool_choice=pb.ToolChoice(mode=REQUIRED))

    def source(tools) -> str:
        found = tool_use(read_request(request), tools, HERMES)
        assert found
        return tool_grammar(found).source

    assert accepts(tokenizer, source(lax), HERMES.write([("f", '{"a": 1}')]))
    with pytest.raises(AssertionError, match="not"):
        accepts(tokenizer, source(strict), "")


def test_a_schema_beside_calls_is_enforced(tokenizer):
    """llguidance alone would accept other spellings of names, and rounded numbers."""
    function = {"name": "f", "parameters": {"properties": {"a": {"type": "integer"}}}}
    tools = [{"type": "function", "function": {**function, "strict": True}}]
    found = tool_use(read_request(chat()), check_tools("t", json.dumps(tools)), HERMES)
    text = text_schema(Constraint("json_schema", '{"properties": {"b": {"type": "null"}}}'), found)
    source = tool_grammar(found, text).source
    for arguments, fits in (('{"a": 1}', True), ('{"\\u0061": "x"}', False)):
        assert accepts(tokenizer, source, HERMES.write([("f", arguments)])) is fits
    for answer, fits in (('{"b": null}', True), ('{"\\u0062": 1}', False)):
        assert accepts(tokenizer, source, answer) is fits
    rounded = {"properties": {"a": {"const": 2**53 + 1}}}
    with pytest.raises(InvalidRequest, match="digits") as caught:
        text_schema(Constraint("json_schema", json.dumps(rounded)), found)
    assert caught.value.field == "constraint.json_schema"
    tools[0]["function"]["parameters"] = rounded
    with pytest.raises(InvalidRequest, match="digits") as caught:
        check_tools("t", json.dumps(tools))
    assert caught.value.field == "t[0].function.parameters"
    tools[0]["function"]["strict"] = False
    (tool,) = check_tools("t", json.dumps(tools))
    assert json.loads(tool.schema)["properties"] == {"a": {}}  # only the constant is dropped


REF = {"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"a": {"type": "integer"}}}}}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"a": {"type": "integer"}}},
        {"type": ["object", "null"], "properties": {"a": {"type": "integer"}}},
        {"anyOf": [{"properties": {"a": {"type": "integer"}}}, {"type": "array"}]},
        REF,
    ],
)
def test_arguments_are_an_object_also_if_the_schema_has_no_type(tokenizer, parameters, strict):
    function = {"name": "f", "parameters": parameters, "strict": strict}
    tools = check_tools("t", json.dumps([{"type": "function", "function": function}]))
    found = tool_use(read_request(chat(tool_choice=pb.ToolChoice(mode=REQUIRED))), tools, HERMES)
    assert found
    source = tool_grammar(found).source
    for arguments, fits in (
        ('{"a": 1}', True),
        ("{}", True),
        ('{"a": "x"}', False),
        ('"x"', False),
        ("12", False),
        ("[1]", False),
        ("null", False),
    ):
        assert accepts(tokenizer, source, HERMES.write([("f", arguments)])) is fits, arguments
    assert found.tools[0].definition["function"]["parameters"] == parameters  # as in the prompt
