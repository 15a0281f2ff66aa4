"""Streaming detokenization equals the library's decode of the whole, however tokens are grouped."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.detokenizer import Detokenizer
from coordinator.tokenizer import Tokenizer
from engine.checkpoint.gguf_tokenizer import tokenizer_files
from engine.checkpoint.source import resolve

DATA = Path(__file__).parents[1] / "data"


def sentencepiece(folder: Path) -> Tokenizer:
    """A small vocabulary with byte tokens and a space before the first word."""
    pieces = ["\u2581", "a", "b", "\u2581a", "ab", "\u00e9", "\u2581\u2581"]
    tokens = ["<unk>", "<s>", "</s>", "<tool>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, 4] + [6] * 256 + [1] * len(pieces),
    }
    for name, content in tokenizer_files(meta, folder / "m.gguf").items():
        (folder / name).write_text(json.dumps(content))
    config = json.loads((resolve("smollm2", progress=False).folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokens) + 5}))
    return Tokenizer.load(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {
        "byte-level": Tokenizer.load(resolve("smollm2", progress=False).folder),
        "sentencepiece": sentencepiece(tmp_path_factory.mktemp("spm")),
    }


def check(tokenizer: Tokenizer, ids: list[int], cuts: list[int], skip: bool) -> None:
    """Grouping changes nothing, and all that was released is the whole decode."""
    single = Detokenizer(tokenizer, skip)
    released = [single.push([i]) for i in ids]
    rest = single.flush()
    whole = tokenizer.decode(ids, skip)
    assert "".join(released) + rest == whole
    grouped = Detokenizer(tokenizer, skip)
    for begin, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        assert grouped.push(ids[begin:end]) == "".join(released[begin:end])
    assert grouped.flush() == rest


def cuts_of(ids: list[int], r: random.Random) -> list[int]:
    return sorted(r.choices(range(len(ids) + 1), k=r.randrange(5)))


def test_recorded_texts(tokenizers: dict[str, Tokenizer]) -> None:
    r = random.Random(0)
    for entry in json.loads((DATA / "tokenization.json").read_text()):
        for skip in (False, True):
            check(tokenizers["byte-level"], entry["ids"], cuts_of(entry["ids"], r), skip)


def byte_tokens(tokenizer: Tokenizer) -> list[int]:
    """Tokens that are a byte or two: random ones make every kind of broken UTF-8."""
    ids = range(tokenizer.library.get_vocab_size())
    pieces = [(i, tokenizer.piece(i)) for i in ids]
    return [i for i, p in pieces if p and p.raw and len(p.raw) <= 2 and max(p.raw) >= 0x80]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_any_tokens(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    token = st.one_of(
        st.integers(0, tokenizer.vocab_size + 3),
        st.sampled_from(byte_tokens(tokenizer)),
        st.integers(0, 3),
    )

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(st.lists(token, max_size=40), st.booleans(), st.randoms(use_true_random=False))
    def run(ids: list[int], skip: bool, r: random.Random) -> None:
        check(tokenizer, ids, cuts_of(ids, r), skip)

    run()


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_characters_are_released_whole(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    text = "a \U0001f600\U0001f469\u200d\U0001f680 \u4e2d\u6587 e\u0301 \u0928\u092e b"
    stream = Detokenizer(tokenizer)
    parts = [stream.push([i]) for i in tokenizer.encode(text, add_special_tokens=False)]
    assert "".join(parts) + stream.flush() == text
    assert not any("\ufffd" in part for part in parts)
    assert len([part for part in parts if part]) > 5, "streams, not all at the end"


def test_half_a_character_is_replaced_only_at_the_end(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
    ids = tokenizer.encode("\U0001f680")
    assert len(ids) > 1
    stream = Detokenizer(tokenizer)
    assert stream.push(ids[:-1]) == ""
    assert stream.flush() == "\ufffd"


def test_a_push_costs_the_same_at_any_length(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte-level"]
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
