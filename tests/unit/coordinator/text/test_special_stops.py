"""Special tokens as stop strings end an output, whether its text shows them or not."""

from __future__ import annotations

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.generation.output import Output
from coordinator.text.served_model import Limits
from coordinator.text.tokenizer import Tokenizer
from engine.base.types import FinishReason
from engine.checkpoint.source import resolve
from engine.pb.diptych.v1 import inference_pb2 as pb
from tests.support.http_front import events, http_front
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.validated import validated

END = "<|im_end|>"  # token 2, the default model's end of sequence
START = "<|im_start|>"
LIMITS = Limits("m", 49152, (2,), 1000)


@cache
def smollm2() -> Tokenizer:
    return Tokenizer.load(resolve("smollm2").folder)


def run(text: str, tokenizer: Tokenizer | None = None, skip: bool = True, **stop):
    """(text, matched stop string or token, tokens) of an output with special tokens."""
    tokenizer = tokenizer or smollm2()
    ids = tokenizer.encode(text, add_special_tokens=False)
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1]),
        stop=pb.Stop(max_tokens=100, **stop),
        output=pb.Output(skip_special_tokens=skip),
    )
    checked = validated(request, LIMITS)
    answer = Output(tokenizer, checked, [1, 5], max_tokens=100, min_tokens=checked.min_tokens)
    released = "".join([answer.push([token]).text for token in ids])
    released += answer.finish().text if answer.ending else ""
    together = Output(tokenizer, checked, [1, 5], max_tokens=100, min_tokens=checked.min_tokens)
    assert together.push(ids).text == released
    ending = answer.ending
    if ending is None:
        return released, None, len(answer.token_ids)
    assert ending.reason is FinishReason.STOP
    assert answer.ended_here == (ending.matched_text is not None)
    matched = ending.matched_token if ending.matched_text is None else ending.matched_text
    return released, matched, len(answer.token_ids)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_a_special_token_ends_the_answer(skip, ignore_eos, include):
    options = {"skip": skip, "ignore_eos": ignore_eos, "include_stop_str_in_output": include}
    tail = END if include else ""
    assert run(f"Yes{END} No", stop=[END], **options) == (f"Yes{tail}", END, 2)
    # With text before it, and behind it.
    assert run(f"Yes\n{END} No", stop=[f"\n{END}"], **options)[:2] == (
        f"Yes\n{tail}" if include else "Yes",
        f"\n{END}",
    )
    assert run(f"Yes{START} No.", stop=[f"{START} No"], **options)[:2] == (
        f"Yes{START} No" if include else "Yes",
        f"{START} No",
    )
    assert run(f"Yes{START}{START}", stop=[START * 2, "x"], **options)[1:] == (START * 2, 3)


@pytest.mark.parametrize("skip", [True, False])
def test_another_stop_string_does_not_hide_the_stop_token(skip):
    assert run(f"Yes{END} No", skip=skip, stop=["x", START]) == ("Yes", 2, 2)
    assert run(f"Yes{END}", skip=skip, stop=[f"No{END}"]) == ("Yes", 2, 2)


def test_a_part_of_a_hidden_token_matches_nothing():
    for stop in ("im", ">", "<", f"{END[:-1]}", f"{END[1:]} No"):
        assert run(f"Yes{END} No", stop=[stop], ignore_eos=True) == ("Yes No", None, 3)
    assert run(f"Yes{END} No", skip=False, stop=["im"], ignore_eos=True)[:2] == ("Yes<|", "im")


def test_shown_text_is_searched_as_shown():
    assert run(f"Yes{START} No", stop=["s N"])[:2] == ("Ye", "s N")
    assert run("Yes <|im_end |>", stop=["<|im_end |>"])[:2] == ("Yes ", "<|im_end |>")


def test_min_tokens():
    assert run(f"Yes{START} No{START} x", stop=[START], min_tokens=2)[1:] == (START, 4)
    assert run(f"Yes{START} No", stop=[START], min_tokens=1)[1:] == (START, 2)


def test_incomplete_text_comes_before_the_token():
    """Bytes of a character, whose run may continue after a hidden token."""
    tokenizer = tiny_tokenizer("llama2")
    text = "a \u4e2d<|end|> b"
    assert run(text, tokenizer, stop=["<|end|>"])[:2] == (" a \u4e2d", "<|end|>")
    assert run(text, tokenizer, stop=["\u4e2d<|end|>"])[:2] == (" a ", "\u4e2d<|end|>")
    assert run(text, tokenizer, stop=["x<|end|>"])[1] is None
    assert run("a \u4e2d</s>", tokenizer, stop=["\u4e2d"])[:2] == (" a ", "\u4e2d")


def test_a_stop_that_the_flushed_characters_complete():
    """max_tokens or the worker ends the output before the run of bytes ends."""
    tokenizer = tiny_tokenizer("llama2")
    ids = tokenizer.encode("a \u4e2d", add_special_tokens=False)
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1]), stop=pb.Stop(max_tokens=len(ids), stop=["\u4e2d"])
    )
    checked = validated(request, LIMITS)
    answer = Output(tokenizer, checked, [1], max_tokens=len(ids), min_tokens=0)
    assert answer.push(ids).text + answer.finish().text == "a "
    assert answer.ending
    assert answer.ending.matched_text == "\u4e2d"


@settings(max_examples=150)
@given(
    st.sampled_from(["llama2", "t5", "byte-level"]),
    st.lists(st.one_of(st.integers(0, 6), st.integers(190, 400)), max_size=20),
    st.lists(st.sampled_from(["<|end|>", "</s>", "a", " ", "<|end|>a", "\u00e9<|end|>", "\ufffd"])),
    st.booleans(),
    st.booleans(),
    st.integers(0, 20),
)
def test_neither_messages_nor_a_resume_change_an_output(kind, ids, stops, skip, include, cut):
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[1]),
        stop=pb.Stop(
            max_tokens=15, stop=stops[:16], include_stop_str_in_output=include, stop_token_ids=[5]
        ),
        output=pb.Output(skip_special_tokens=skip),
    )
    tokenizer = tiny_tokenizer(kind)

    def new(resumed=()):
        request.ClearField("resume")
        if resumed:
            request.resume.add(token_ids=resumed)
        checked = validated(request, LIMITS)
        answer = Output(tokenizer, checked, [1, 200], max_tokens=15, min_tokens=0)
        list(answer.catch_up())
        return answer

    single = new()
    chunks = []
    for token in ids:
        if single.ending is None:
            chunks.append(single.push([token]))
    rest = single.finish() if single.ending else None
    assert rest is None or rest.text == "", "the token that ends an answer brings all its text"
    whole = new()
    assert whole.push(ids).text == "".join(chunk.text for chunk in chunks)
    assert (whole.ending, whole.token_ids) == (single.ending, single.token_ids)
    taken = single.token_ids
    cut = min(cut, len(taken))
    later = new(taken[:cut])
    assert [later.push([token]) for token in taken[cut:]] == chunks[cut:]
    assert later.ending == single.ending


def test_beside_tools():
    tool = {"type": "function", "function": {"name": "f"}}
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    for text, ignore_eos in ((f"{call}{END}", False), (f"{call}\n{END}", True)):
        request = pb.ChatRequest(
            messages=[pb.Message(role="user", content="x")],
            tools_json=json.dumps([tool]),
            stop=pb.Stop(stop=[END], ignore_eos=ignore_eos),
        )
        answer = Output(smollm2(), validated(request, LIMITS), max_tokens=100, min_tokens=0)
        chunk = answer.push(smollm2().encode(text))
        assert chunk.text == ""
        assert [piece.name for piece in chunk.tool_calls] == ["f"]
        assert answer.ending
        assert answer.ending.matched_text == END


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("ignore_eos", [False, True])
async def test_by_http(stream, ignore_eos):
    ids = smollm2().encode(f"The river{END} was wide.")
    body = {"stop": [END], "ignore_eos": ignore_eos, "stream": stream}
    async with http_front() as f:
        await f.worker(answer=ids)
        for response in (await f.complete(**body), await f.chat(**body)):
            parts = events(response) if stream else [response.json()]
            choices = [part["choices"][0] for part in parts]
            said = [
                c.get("message") or c.get("delta") or {"content": c.get("text")} for c in choices
            ]
            assert "".join(each.get("content") or "" for each in said) == "The river"
            assert choices[-1]["finish_reason"] == "stop"
            assert choices[-1]["stop_reason"] == END
