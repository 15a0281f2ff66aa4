"""Streaming detokenization equals tokenizers' decode of the whole, in any grouping of tokens."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.text.detokenizer import Detokenizer
from coordinator.text.tokenizer import Tokenizer
from engine.checkpoint.source import resolve
from tests.support.paths import DATA
from tests.support.tiny_tokenizer import KINDS, tiny_tokenizer

SMOLLM2 = "smollm2"


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    if kind == SMOLLM2:
        return Tokenizer.load(resolve("smollm2").folder)
    return tiny_tokenizer(kind)


def expected(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool) -> str:
    """decode(prompt + output) from where it differs from decode(prompt)."""
    before, whole = tokenizer.decode(prompt, skip), tokenizer.decode(prompt + ids, skip)
    while not whole.startswith(before):
        before = before[:-1]
    return whole.removeprefix(before)


def written(stream: Detokenizer, ids: list[int]) -> tuple[str, list[int], list[str], str]:
    """(text, token positions, text released by each token, rest)."""
    positions, released = [], []
    for i in ids:
        positions.append(stream.position_of(i))
        released.append(stream.push([i]))
    rest = stream.flush()
    return "".join(released) + rest, positions, released, rest


def check_positions(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip: bool) -> None:
    """Complete characters are in the text at their positions, after broken ones too."""
    for is_echoed in (False, True):
        stream = Detokenizer(tokenizer, skip, prompt=prompt)
        if is_echoed:
            stream.release_due()
        starts = []
        text, positions, _, _ = written(stream, ids)
        again = Detokenizer(tokenizer, skip, prompt=prompt)
        for i in ids:
            starts.append(again.is_at_start)
            again.push([i])
        for i, at, at_start in zip(ids, positions, starts, strict=True):
            piece = tokenizer.piece(i)
            is_byte = piece and piece.raw is not None and not tokenizer.decoding.byte_level
            token = tokenizer.text_at_start(i) if at_start else tokenizer.text_of(i)
            if not is_byte and "\ufffd" not in token and not again.hides(i):
                assert text.startswith(token, at), (i, token, at, text)


def check(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool, prompt: Sequence[int] = ()
) -> None:
    """Grouping changes nothing, the released text is the whole decode, and token positions are
    right.
    """
    prompt = list(prompt)
    single = Detokenizer(tokenizer, skip, prompt=prompt)
    text, positions, released, rest = written(single, ids)
    assert text == expected(tokenizer, prompt, ids, skip)
    check_positions(tokenizer, prompt, ids, skip)
    grouped = Detokenizer(tokenizer, skip, prompt=prompt)
    for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        assert grouped.push(ids[begin:end]) == "".join(released[begin:end])
        assert grouped.position_of(ids[end]) == positions[end] if end < len(ids) else True
    assert grouped.flush() == rest
    # If the prompt is shown without its broken end, the output completes it.
    shown = Detokenizer(tokenizer, skip, prompt=prompt)
    due = shown.release_due()
    before = tokenizer.decode(prompt, skip).removesuffix(due)
    assert before + shown.push(ids) + shown.flush() == tokenizer.decode(prompt + ids, skip)


def cuts_of(ids: list[int], r: random.Random) -> list[int]:
    return sorted(r.choices(range(len(ids) + 1), k=r.randrange(5)))


def test_recorded_texts() -> None:
    r = random.Random(0)
    for entry in json.loads((DATA / "tokenization.json").read_text()):
        for skip in (False, True):
            check(tokenizer_of(SMOLLM2), entry["ids"], cuts_of(entry["ids"], r), skip)


def byte_tokens(tokenizer: Tokenizer) -> list[int]:
    """Tokens of one or two bytes: random ones give every kind of broken UTF-8."""
    ids = range(tokenizer.library.get_vocab_size())
    pieces = [(i, tokenizer.piece(i)) for i in ids]
    return [i for i, p in pieces if p and p.raw and len(p.raw) <= 2 and max(p.raw) >= 0x80]


@pytest.mark.parametrize("kind", [SMOLLM2, *KINDS])
def test_any_tokens_after_any_prompt(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokens = [
        st.integers(0, tokenizer.library.get_vocab_size() + 3),
        st.integers(0, 3),
        *([st.sampled_from(found)] if (found := byte_tokens(tokenizer)) else []),
    ]
    token = st.one_of(*tokens)

    @settings(max_examples=100)
    @given(
        st.lists(token, max_size=8),
        st.lists(token, max_size=30),
        st.booleans(),
        st.randoms(use_true_random=False),
    )
    def run(prompt: list[int], ids: list[int], skip: bool, r: random.Random) -> None:
        check(tokenizer, ids, cuts_of(ids, r), skip, prompt)

    run()


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_after_a_prompt_keeps_its_first_space(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer.encode("The worker reads")
    whole = tokenizer.encode("The worker reads the the")
    assert whole[: len(prompt)] == prompt
    stream = Detokenizer(tokenizer, prompt=prompt)
    assert stream.push(whole[len(prompt) :]) + stream.flush() == " the the"
    begun = Detokenizer(tokenizer, prompt=tokenizer.encode(""))  # BOS, or nothing
    assert begun.push(prompt) + begun.flush() == tokenizer.decode(prompt)


@pytest.mark.parametrize("kind", ["llama2", "gemma", "metaspace, bytes", "bytes, metaspace"])
def test_a_prompt_may_end_within_a_character(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    the, a = (tokenizer.library.token_to_id(f"\u2581{word}") for word in ("the", "a"))
    first, second = (tokenizer.library.token_to_id(f"<0x{b}>") for b in ("C3", "A9"))
    broken = [1, the, a, first]
    assert Detokenizer(tokenizer, prompt=broken).push([second]) == ""
    stream = Detokenizer(tokenizer, prompt=broken)
    assert stream.push([second, a]) == "é a"
    assert Detokenizer(tokenizer, prompt=broken).push([a]) == " a"
    whole = Detokenizer(tokenizer, prompt=[*broken, second])  # the prompt's text contains it
    assert whole.push([a]) == " a"


def test_a_token_that_breaks_a_character_follows_it() -> None:
    for kind in ("llama2", "byte-level"):
        tokenizer = tokenizer_of(kind)
        head = tokenizer.encode("\u4e2d", add_special_tokens=False)[-3:-1]
        word = tokenizer.encode("The worker", add_special_tokens=False)[-1]
        stream = Detokenizer(tokenizer, prompt=tokenizer.encode("The"))
        text, positions, _, _ = written(stream, [word, *head, word])
        assert text[positions[-1] :] == " worker"
        assert positions[:3] == [0, 7, 7]


def test_the_position_of_a_token_is_that_of_its_character() -> None:
    tokenizer = tokenizer_of("llama2")
    stream = Detokenizer(tokenizer, prompt=tokenizer.encode("The worker"))
    positions = []
    for token in [*tokenizer.encode("the a \u4e2d\u6587 c")[1:], 3, 3]:
        positions.append(stream.position_of(token))
        stream.push([token])
    # " the", " a", " ", three bytes, three bytes, " ", "c", two that are not shown
    assert positions == [0, 4, 6, 7, 7, 7, 8, 8, 8, 9, 10, 11, 11]


@pytest.mark.parametrize("kind", [SMOLLM2, "byte-level", "llama2", "gemma"])
def test_only_complete_characters_are_released(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    text = "a \U0001f600\U0001f469\u200d\U0001f680 \u4e2d\u6587 e\u0301 \u0928\u092e b"
    stream = Detokenizer(tokenizer)
    parts = [stream.push([i]) for i in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(parts) + stream.flush() == text
    assert not any("\ufffd" in part for part in parts)
    assert len([part for part in parts if part]) > 5, "streams, not all at the end"


def test_an_incomplete_character_is_replaced_only_at_the_end() -> None:
    tokenizer = tokenizer_of(SMOLLM2)
    ids = tokenizer.encode("\U0001f680")
    assert len(ids) > 1
    stream = Detokenizer(tokenizer)
    assert stream.push(ids[:-1]) == ""
    assert stream.flush() == "\ufffd"


def test_the_cost_of_a_push_does_not_depend_on_the_length() -> None:
    tokenizer = tokenizer_of(SMOLLM2)
    ids = tokenizer.encode("The quick brown \U0001f98a jumps over the lazy \U0001f436.\n" * 2000)

    def cost(part: list[int]) -> float:
        begin = time.perf_counter()
        for i in part:
            stream.push([i])
        return time.perf_counter() - begin

    ratios = []
    for _ in range(3):
        stream = Detokenizer(tokenizer)
        size = len(ids) // 10
        first = cost(ids[:size])
        stream.push(ids[size:-size])
        ratios.append(cost(ids[-size:]) / first)
    assert min(ratios) < 2


@pytest.mark.parametrize("kind", [SMOLLM2, *KINDS])
def test_the_cost_does_not_depend_on_the_prompt_length(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer.encode("The worker reads the, a b the.") * 10_000
    begin = time.perf_counter()
    Detokenizer(tokenizer, prompt=prompt)
    assert time.perf_counter() - begin < 0.01, "only its start and its end are read"
