"""Reasoning: the form of each family, at any borders, from tokens, and before constraints."""

from __future__ import annotations

import random

import pytest

from coordinator.generation.output import Output
from coordinator.text.reasoning import REASONING, ReasoningFormat, detect_reasoning
from coordinator.text.served_model import Limits
from coordinator.text.tokenizer import Tokenizer
from coordinator.text.tools.forms import FORMATS
from engine.base.option_groups import FrontOptions
from engine.base.types import Constraint, ConstraintKind
from engine.checkpoint.source import resolve
from engine.constraints.grammar import Vocabulary, grammar_of
from engine.pb.diptych.v1 import inference_pb2 as pb
from tests.support.validated import validated

THINK, HARMONY = REASONING["think"], REASONING["harmony"]
TAGS = [form for form in REASONING.values() if not form.is_channels]
ANALYSIS = "<|channel|>analysis<|message|>Let me see.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>It is 4."
CALL = "<|channel|>commentary to=functions.add <|constrain|>json<|message|>{}"


def split(form: ReasoningFormat, is_open: bool | None, pieces) -> tuple[str, str]:
    reader = form.reader(is_open)
    parts = [*map(reader.push, pieces), reader.flush()]
    return "".join(p.reasoning for p in parts), "".join(p.content for p in parts)


def at_any_borders(form: ReasoningFormat, is_open: bool | None, text: str) -> tuple[str, str]:
    found = split(form, is_open, [text])
    assert split(form, is_open, list(text)) == found
    rng = random.Random(text)
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(text) + 1), min(4, len(text))))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        assert split(form, is_open, pieces) == found, pieces
    return found


@pytest.mark.parametrize("form", TAGS, ids=lambda f: f.name)
def test_reasoning_between_tags(form):
    inner = "First <this>, then\n\nthat: 2 < 3."
    closed = f"\n{inner}\n{form.end}\n\nIt is 4.\n"
    assert at_any_borders(form, True, closed) == (inner, "It is 4.\n")
    assert at_any_borders(form, None, form.begin + closed) == (inner, "It is 4.\n")
    assert at_any_borders(form, None, " It is 4.") == ("", " It is 4.")
    assert at_any_borders(form, False, " It is 4.") == ("", " It is 4.")
    cut = f"{inner} {form.end[:3]}"
    assert at_any_borders(form, True, cut) == (cut, "")


def test_markers_of_content_are_dropped():
    granite, kimi = REASONING["granite"], REASONING["kimi_k3"]
    text = "<think>a</think><response>b</response>"
    assert at_any_borders(granite, None, text) == ("a", "b")
    text = "a<|close|>think<|sep|><|open|>response<|sep|>b<|close|>response<|sep|>"
    assert at_any_borders(kimi, True, text) == ("a", "b")
    solar = "<|think|>a<|end|><|begin|>assistant<|content|>b"
    assert at_any_borders(REASONING["solar"], None, solar) == ("a", "b")


def test_channels():
    assert at_any_borders(HARMONY, None, ANALYSIS + FINAL) == ("Let me see.", "It is 4.")
    assert at_any_borders(HARMONY, None, FINAL) == ("", "It is 4.")
    assert at_any_borders(HARMONY, None, ANALYSIS + CALL) == ("Let me see.", CALL)
    # A header may name the recipient first; parsers of calls get one form.
    other = " to=functions.add<|channel|>commentary json<|message|>{}"
    assert at_any_borders(HARMONY, None, other) == ("", CALL)
    said = "<|channel|>commentary<|message|>I look. <|end|><|start|>assistant"
    assert at_any_borders(HARMONY, None, said + CALL) == ("", "I look. " + CALL)
    assert at_any_borders(HARMONY, None, "Plain text.") == ("", "Plain text.")
    muse = " to=self<|message|>a<|eom|><|start|>assistant to=user<|message|>b"
    assert at_any_borders(REASONING["muse"], None, muse) == ("a", "b")


def test_the_prompt_shows_whether_reasoning_is_open():
    assert THINK.is_open("<|im_start|>assistant\n<think>\n") is True
    assert THINK.is_open("<|im_start|>assistant\n<think>\n\n</think>\n\n") is False
    assert THINK.is_open("Say <think><|im_end|>\n<|im_start|>assistant\n") is None


def test_the_form_is_found_in_template_or_vocabulary():
    assert detect_reasoning("{{ '<think>' + x + '</think>' }}", ()) is THINK
    assert detect_reasoning("<|channel|>analysis<|message|>", ()) is HARMONY
    assert detect_reasoning("'[THINK]' '[/THINK]'", ()) is REASONING["mistral"]
    assert detect_reasoning("{{ messages }}", ("<think>", "</think>")) is THINK
    assert detect_reasoning("{{ messages }}", ("<|im_end|>",)) is None


def test_the_option_has_all_forms():
    (field,) = [f for f in FrontOptions.__dataclass_fields__.values() if f.name.startswith("reaso")]
    assert set(field.metadata["choices"]) == {"auto", "none", *REASONING}


# From tokens


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve("smollm2").folder)


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(resolve("smollm2").folder, 49152, (2,)).build()


def output_of(tokenizer: Tokenizer, form, prompt_text: str = "", **fields) -> Output:
    limits = Limits("m", 60_000, (2,), 1000, FORMATS["hermes"], form)
    fields.setdefault("request_id", "r")
    request = pb.ChatRequest(messages=[pb.Message(role="user", content="x")], **fields)
    prompt = tokenizer.encode(prompt_text)
    output = Output(tokenizer, validated(request, limits), prompt, max_tokens=500, min_tokens=0)
    list(output.catch_up())
    return output


TOOLS = '[{"type": "function", "function": {"name": "add"}}]'


@pytest.mark.parametrize("opened", ["assistant\n", "assistant\n<think>\n"])
def test_a_resumed_output_is_split_at_the_same_tokens(tokenizer, opened):
    text = "<think>" * ("<think>" not in opened) + "Hm, so.\n</think>\n\nIt is 4."
    call = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    tokens = tokenizer.encode(text + call)
    whole = output_of(tokenizer, THINK, opened, tools_json=TOOLS)
    chunks = [whole.push([token]) for token in tokens]
    assert "".join(c.reasoning for c in chunks) == "Hm, so."
    assert "".join(c.text for c in chunks) == "It is 4."
    assert [piece.name for c in chunks for piece in c.tool_calls] == ["add"]
    assert 4 < whole.num_reasoning < len(tokens) - 8
    for cut in range(len(tokens)):
        resume = [pb.Resume(token_ids=tokens[:cut])]
        later = output_of(tokenizer, THINK, opened, tools_json=TOOLS, resume=resume)
        assert [later.push([token]) for token in tokens[cut:]] == chunks[cut:]
        assert later.num_reasoning == whole.num_reasoning
    at_once = output_of(tokenizer, THINK, opened, tools_json=TOOLS).push(tokens)
    assert (at_once.reasoning, at_once.text) == ("Hm, so.", "It is 4.")


def test_stop_strings_act_on_content_alone(tokenizer):
    output = output_of(tokenizer, THINK, stop=pb.Stop(stop=["so"]))
    chunk = output.push(tokenizer.encode("<think>Hm, so.</think>I say so."))
    assert (chunk.reasoning, chunk.text) == ("Hm, so.", "I say ")
    assert output.ending.matched_text == "so"


def test_without_a_parser_all_is_content(tokenizer):
    output = output_of(tokenizer, None)
    assert output.push(tokenizer.encode("<think>a</think>b")).text == "<think>a</think>b"
    assert output.num_reasoning == 0


def test_an_output_cut_off_while_it_reasons(tokenizer):
    output = output_of(tokenizer, THINK, "<think>\n")
    chunks = [output.push(tokenizer.encode("Hm, <")), output.finish()]
    assert "".join(c.reasoning for c in chunks) == "Hm, <"
    assert not any(c.text for c in chunks)


# Constraints apply after the reasoning


def allows(vocabulary, tokenizer, constraint: Constraint, text: str) -> bool:
    grammar = grammar_of(vocabulary, constraint, [tokenizer.encode(text)])
    assert not grammar.reason or grammar.mismatch_index >= 0, grammar.reason
    return grammar.mismatch_index < 0


SCHEMA = '{"type": "object", "properties": {"a": {"type": "integer"}}}'
CONSTRAINTS = [
    (Constraint(ConstraintKind.JSON_SCHEMA, SCHEMA), '{"a": 1}', '{"a": "x"}'),
    (Constraint(ConstraintKind.REGEX, "yes|no"), "yes", "maybe"),
    (Constraint(ConstraintKind.LARK, 'start: "a" | "b"'), "b", "c"),
]


@pytest.mark.parametrize(("constraint", "good", "bad"), CONSTRAINTS, ids=["json", "regex", "lark"])
@pytest.mark.parametrize("form", [THINK, REASONING["mistral"], HARMONY], ids=lambda f: f.name)
def test_a_constraint_applies_after_the_reasoning(
    vocabulary, tokenizer, form, constraint, good, bad
):
    for is_open in (True, False, None) if not form.is_channels else (None,):
        prologue = form.prologue(is_open, has_calls=False)
        held = Constraint(constraint.kind, constraint.source, prologue=prologue)
        thoughts = f'Is it "5" or 12345678901234567890123? {form.end}{form.between}'
        before = {True: thoughts, False: "", None: form.begin + thoughts}[is_open]
        before += form.content_begin
        assert allows(vocabulary, tokenizer, held, before + good)
        assert not allows(vocabulary, tokenizer, held, before + bad)
        if is_open is None:
            assert allows(vocabulary, tokenizer, held, form.content_begin + good)
        if is_open is False:
            assert prologue == ""


def test_no_reasoning_no_prologue(tokenizer):
    assert THINK.prologue(False, has_calls=True) == ""
    assert THINK.prologue(True, has_calls=True).startswith('// JSON after "</think>"\n')
