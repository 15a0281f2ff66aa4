"""Each form of tool calls: an example as models write it, values by their schema, other forms."""

from __future__ import annotations

import json
import random

import pytest

from coordinator.api.grpc.requests import read_request
from coordinator.api.validation.tools import check_enforced, check_tools, tool_use
from coordinator.text.tokenizer import Tokenizer
from coordinator.text.tools.format import ToolFormat, ToolUse
from coordinator.text.tools.forms import FORMATS, NO_FORMAT
from coordinator.text.tools.grammar import tool_grammar
from coordinator.text.tools.parser import ToolCalls
from engine.base.errors import InvalidRequest
from engine.checkpoint.source import resolve
from engine.constraints.grammar import Vocabulary, grammar_of
from engine.pb.diptych.v1 import inference_pb2 as pb

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
DEFINITION = {"type": "function", "function": {"name": "look", "parameters": PARAMETERS}}
ARGUMENTS = {"city": "Oslo North", "days": 3}
JSON = json.dumps(ARGUMENTS)

# A call as the model of each family writes it, by hand from the templates of the models.
EXAMPLES = {
    "hermes": '<tool_call>\n{"name": "look", "arguments": %s}\n</tool_call>',
    "llama3": '{"name": "look", "parameters": %s}',
    "mistral": '[TOOL_CALLS][{"name": "look", "arguments": %s}]',
    "mistral_args": "[TOOL_CALLS]look[ARGS]%s",
    "mistral_call_id": "[TOOL_CALLS]look[CALL_ID]abcDEF123[ARGS]%s",
    "apertus": '<|tools_prefix|>[{"look": %s}]<|tools_suffix|>',
    "apriel": '<tool_calls>[{"name": "look", "arguments": %s}]</tool_calls>',
    "nemotron": '<TOOLCALL>[{"name": "look", "arguments": %s}]</TOOLCALL>',
    "granite": '<|tool_call|>[{"name": "look", "arguments": %s}]',
    "phi4_mini": '<|tool_call|>[{"name": "look", "arguments": %s}]<|/tool_call|>',
    "firefunction": 'functools[{"name": "look", "arguments": %s}]',
    "command_r7b": '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "look", "parameters":'
    " %s}\n]<|END_ACTION|>",
    "command_r": 'Action:\n```json\n[\n    {\n        "tool_name": "look",\n        "parameters":'
    " %s\n    }\n]```",
    "minimax_m1": '<tool_calls>\n{"name": "look", "arguments": %s}\n</tool_calls>',
    "functionary_v31": "<function=look>%s</function>",
    "gigachat3": '<|message_sep|>\n\nfunction call<|role_sep|>\n{"name": "look", "arguments": %s}',
    "gigachat31": '<|function_call|>{"name": "look", "arguments": %s}',
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0"
    "<|tool_call_argument_begin|>%s<|tool_call_end|><|tool_calls_section_end|>",
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>look<｜tool▁sep｜>%s"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n"
    "```json\n%s\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "solar": "<|tool_calls|><|tool_call:begin|>abcDEF1234<|tool_call:name|>look<|tool_call:args|>%s"
    "<|tool_call:end|>",
    "harmony": "<|channel|>commentary to=functions.look <|constrain|>json<|message|>%s",
    "qwen3_coder": "<tool_call>\n<function=look>\n<parameter=city>\nOslo North\n</parameter>\n"
    "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
    "seed_oss": "<seed:tool_call>\n<function=look>\n<parameter=city>Oslo North</parameter>\n"
    "<parameter=days>3</parameter>\n</function>\n</seed:tool_call>",
    "glm": "<tool_call>look\n<arg_key>city</arg_key>\n<arg_value>Oslo North</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
    "hunyuan": "<tool_calls:opensource>\n<tool_call:opensource>look<tool_sep:opensource>\n"
    "<arg_key:opensource>city</arg_key:opensource>\n"
    "<arg_value:opensource>Oslo North</arg_value:opensource>\n"
    "<arg_key:opensource>days</arg_key:opensource>\n"
    "<arg_value:opensource>3</arg_value:opensource>\n</tool_call:opensource>\n"
    "</tool_calls:opensource>",
    "minimax_m2": '<minimax:tool_call>\n<invoke name="look">\n'
    '<parameter name="city">Oslo North</parameter>\n<parameter name="days">3</parameter>\n'
    "</invoke>\n</minimax:tool_call>",
    "minimax_m3": ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="look">'
    "]<]minimax[>[<city>Oslo North]<]minimax[>[</city>]<]minimax[>[<days>3]<]minimax[>[</days>"
    "]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>",
    "minicpm5": '<function name="look"><param name="city">Oslo North</param>'
    '<param name="days">3</param></function>',
    "deepseek_v4": '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="look">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo North</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
    "deepseek_v32": '<｜DSML｜function_calls>\n<｜DSML｜invoke name="look">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo North</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
    "kimi_k3": '<|open|>tools<|sep|><|open|>call tool="look" index="1"<|sep|>'
    '<|open|>argument key="city" type="string"<|sep|>Oslo North<|close|>argument<|sep|>'
    '<|open|>argument key="days" type="number"<|sep|>3<|close|>argument<|sep|>'
    "<|close|>call<|sep|><|close|>tools<|sep|>",
    "muse": '<atem:function_calls>\n<atem:invoke name="look">\n'
    '<atem:parameter name="city">Oslo North</atem:parameter>\n'
    '<atem:parameter name="days">3</atem:parameter>\n</atem:invoke>\n</atem:function_calls>',
    "lfm2": '<|tool_call_start|>[look(city="Oslo North", days=3)]<|tool_call_end|>',
    "gemma4": '<|tool_call>call:look{city:<|"|>Oslo North<|"|>,days:3}<tool_call|>',
}
EXAMPLES = {name: text.replace("%s", JSON) for name, text in EXAMPLES.items()}
ALIKE = {("granite", "phi4_mini")}  # the first one's calls begin as the second one's


def use(form: ToolFormat, definition=DEFINITION, mode: str = "MODE_REQUIRED", **fields) -> ToolUse:
    request = pb.ChatRequest(tool_choice=pb.ToolChoice(mode=mode), **fields)
    tools = check_tools("tools_json", json.dumps([definition]))
    found = tool_use(read_request(request), tools, form)
    assert found
    return found


def calls_in(form: ToolFormat, pieces, definition=DEFINITION) -> tuple[str, list]:
    parser = ToolCalls(use(form, definition), lambda i, name: f"{i}")
    parsed = [*map(parser.push, pieces), parser.flush(is_cut=False)]
    calls = [(c.name, json.loads(c.arguments)) for each in parsed for c in each.pieces]
    return "".join(each.text for each in parsed), calls


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(resolve("smollm2").folder, 49152, (2,)).build()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve("smollm2").folder)


def test_every_form_has_an_example():
    assert set(EXAMPLES) == set(FORMATS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_read_at_any_borders(name):
    form, text = FORMATS[name], EXAMPLES[name]
    rng = random.Random(name)
    for before in ("", "I look.\n") if form.trigger else ("",):
        for _ in range(20):
            cuts = sorted(rng.sample(range(len(before + text) + 1), 5))
            pieces = [(before + text)[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
            assert calls_in(form, pieces) == (before, [("look", ARGUMENTS)]), pieces


@pytest.mark.parametrize("name", EXAMPLES)
def test_calls_are_written_as_in_the_example(name):
    written = FORMATS[name].write([("look", JSON)])
    expected = EXAMPLES[name]
    if name in ("mistral_call_id", "solar"):  # with an id of our own
        expected = expected.replace("abcDEF123", written.partition("ID]")[2][:9] or "abcDEF123")
        expected = expected.replace("abcDEF1234", written.partition("begin|>")[2][:10])
    if name == "kimi_k3":  # counts from one in a conversation
        expected = expected.replace('index="1"', 'index="0"')
    assert written == expected


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_grammar_accepts_its_form_and_no_other(name, vocabulary, tokenizer):
    form = FORMATS[name]
    constraint = tool_grammar(use(form))
    header = form.header.replace("{name}", "look")
    for other, text in EXAMPLES.items():
        grammar = grammar_of(vocabulary, constraint, [tokenizer.encode(header + text)])
        accepts = not grammar.reason and grammar.mismatch_index < 0
        assert accepts is (other == name or (other, name) in ALIKE), (other, grammar.reason)


@pytest.mark.parametrize("name", EXAMPLES)
def test_other_forms_are_text(name):
    form = FORMATS[name]
    for other, text in EXAMPLES.items():
        if other == name or {other, name} == {"granite", "phi4_mini"}:
            continue
        found = [arguments for _, arguments in _calls_or_garbage(form, text)]
        assert ARGUMENTS not in found, other


def _calls_or_garbage(form: ToolFormat, text: str) -> list:
    try:
        return calls_in(form, [text])[1]
    except ValueError:  # what stands for arguments is no JSON
        return []


TYPED = {
    "type": "function",
    "function": {
        "name": "put",
        "parameters": {
            "type": "object",
            "properties": {
                "code": {"type": "string"},
                "unit": {"enum": ["C", "F"]},
                "size": {"type": "number"},
                "on": {"type": "boolean"},
                "tags": {"type": "array", "items": {"type": "string"}},
                "at": {"$ref": "#/$defs/Place"},
                "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
            "required": ["code"],
            "$defs": {"Place": {"type": "object", "properties": {"x": {"type": "integer"}}}},
        },
    },
}
VALUES = [
    {"code": "5"},
    {"code": "if a < b:\n    print(\"</p>\", 'x')\n", "unit": "F"},
    {"code": "", "size": -2.5, "on": True, "tags": ["a", "b, c"], "at": {"x": 1}},
    {"code": "true", "on": False, "tags": [], "maybe": "12"},
    {"code": "12345678901234567890123456789", "maybe": "y"},
    {"code": "Zürich 😀"},
]


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("values", VALUES, ids=range(len(VALUES)))
def test_values_keep_their_types(name, values, vocabulary, tokenizer):
    form = FORMATS[name]
    written = form.write([("put", json.dumps(values, ensure_ascii=False))])
    for pieces in ([written], list(written)):
        assert calls_in(form, pieces, TYPED) == ("", [("put", values)])
    tokens = tokenizer.encode(form.header.replace("{name}", "put") + written)
    grammar = grammar_of(vocabulary, tool_grammar(use(form, TYPED)), [tokens])
    assert (grammar.reason, grammar.mismatch_index) == ("", -1), written


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.text_begin])
def test_text_is_marked_where_the_family_marks_it(name, vocabulary, tokenizer):
    form = FORMATS[name]
    constraint = tool_grammar(use(form, mode="MODE_AUTO"))
    header = form.header.replace("{name}", "look")
    for text, fits in (
        (f"{form.text_begin}It rains.{form.text_end}", True),
        (header + EXAMPLES[name], True),
        ("It rains.", False),
    ):
        grammar = grammar_of(vocabulary, constraint, [tokenizer.encode(text)])
        assert (grammar.mismatch_index < 0) is fits, (text, grammar.reason)


@pytest.mark.parametrize("name", ["qwen3_coder", "glm", "lfm2", "gemma4"])
def test_a_grammar_holds_the_types(name, vocabulary, tokenizer):
    form = FORMATS[name]
    constraint = tool_grammar(use(form, TYPED))
    for values in ({"unit": "F"}, {"code": "a", "unit": "K"}, {"code": "a", "size": "x"}):
        written = form.write([("put", json.dumps(values))])
        grammar = grammar_of(vocabulary, constraint, [tokenizer.encode(written)])
        assert grammar.mismatch_index == 0, written


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "x"}}}, "properties.a.pattern"),
        ({"anyOf": [{"properties": {"a": {}}}]}, "anyOf"),
        ({"type": "object"}, "additionalProperties"),
    ],
)
def test_what_a_form_cannot_enforce_is_refused_of_strict_tools(schema, keyword):
    function = {"name": "f", "parameters": schema, "strict": True}
    definition = {"type": "function", "function": function}
    check_enforced("tools_json", use(FORMATS["hermes"], definition))
    with pytest.raises(InvalidRequest, match=keyword) as caught:
        check_enforced("tools_json", use(FORMATS["qwen3_coder"], definition))
    assert caught.value.field == "tools_json[0].function.parameters"
    function["strict"] = False
    check_enforced("tools_json", use(FORMATS["qwen3_coder"], definition))


def test_an_unknown_form_is_text_alone():
    found = use(NO_FORMAT, mode="MODE_AUTO")
    assert [tool.name for tool in found.tools] == ["look"]  # for the prompt
    assert found.callable == ()
    for choice in (pb.ToolChoice(mode="MODE_REQUIRED"), pb.ToolChoice(name="look")):
        request = read_request(pb.ChatRequest(tool_choice=choice))
        with pytest.raises(InvalidRequest, match="--tool-format") as caught:
            tool_use(request, check_tools("t", json.dumps([DEFINITION])), NO_FORMAT)
        assert caught.value.field == "tool_choice"
