"""tokenizer.json from GGUF metadata: the splits of each named pre-tokenizer, and SentencePiece
vocabularies.
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from engine.base.errors import CheckpointError
from engine.checkpoint.gguf_tokenizer import CONTROL_BY_NAME, tokenizer_files
from tests.support import tiny_gguf

TOKENS, MERGES = tiny_gguf.byte_level_vocab()
ALPHABET = "aZ é中\U0001f600'’sLL1²³٣½ \t\n\r.,!/_-<>$+=~^|`\u00a0\u3000İß\u0301ǅ"


META = {
    "model": "gpt2",
    "tokens": TOKENS,
    "merges": MERGES,
    "pre": "smollm",
    "token_type": [3, 3, 4] + [1] * (len(TOKENS) - 3),
}


def make(meta: dict[str, Any]) -> Tokenizer:
    files = tokenizer_files(meta, Path("m.gguf"))
    return Tokenizer.from_str(json.dumps(files["tokenizer.json"]))


def byte_level(pre: str, **more: Any) -> Tokenizer:
    meta = {f"tokenizer.ggml.{k}": v for k, v in (META | {"pre": pre} | more).items()}
    return make(meta)


def splits(tokenizer: Tokenizer, text: str) -> list[str]:
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["hi", "Ġ", "1", "2", "3", "4", "'s", "ĠA", ".", "Ċ", "Ċ"]),
        ("gpt-2", ["hi", "Ġ1234", "'s", "ĠA", ".", "Ċ", "Ċ"]),
        ("llama-bpe", ["hi", "Ġ", "123", "4", "'s", "ĠA", ".ĊĊ"]),
        ("qwen2", ["hi", "Ġ", "1", "2", "3", "4", "'s", "ĠA", ".ĊĊ"]),
        ("tekken", ["hi", "Ġ", "1", "2", "3", "4", "'s", "ĠA", ".ĊĊ"]),
        ("default", ["hi", "Ġ", "123", "4", "'", "s", "ĠA", ".", "Ċ", "Ċ"]),
    ],
)
def test_named_splits(pre: str, expected: list[str]) -> None:
    # A run of blank lines at the end of a text is one piece for the GPT-2 expression.
    found = splits(byte_level(pre), "hi 1234's A.\n\n")
    joined = [*expected[:-2], "ĊĊ"] if expected[-1] == "Ċ" else expected
    assert found == joined


# Of a text with what the families treat differently: case, apostrophes, digits, scripts, slashes.
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("gpt-2 olmo", "DoIt|'|S| 12345| 你好ab| (|x|)/|\n"),
        ("refact starcoder command-r", "DoIt|'|S| |1|2|3|4|5| 你好ab| (|x|)/|\n"),
        ("llama-bpe dbrx smaug-bpe glm4 chatglm-bpe", "DoIt|'S| |123|45| 你好ab| (|x|)/\n"),
        ("qwen2 qwen35", "DoIt|'S| |1|2|3|4|5| 你好ab| (|x|)/\n"),
        ("gpt-4o minimax-m2", "Do|It'S| |123|45| 你好ab| (|x|)/\n"),
        ("tekken", "Do|It|'S| |1|2|3|4|5| 你好ab| (|x|)/\n"),
        ("kimi-k2", "Do|It'S| |123|45| |你好|ab| (|x|)/\n"),
        ("deepseek-llm deepseek-coder", "DoIt|'|S| |1|2|3|4|5| |你好|ab| (|x|)/|\n"),
        ("deepseek-v3", "DoIt|'S| |123|45| |你好|ab| (|x|)/\n"),
    ],
)
def test_families_cut_differently(names: str, expected: str) -> None:
    text = expected.replace("|", "")
    for pre in names.split():
        pieces = byte_level(pre).pre_tokenizer.pre_tokenize_str(text)
        assert "|".join(text[first:end] for _, (first, end) in pieces) == expected, pre


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        ("qwen2", "Qwen2Tokenizer"),
        ("qwen35", "Qwen3_5Tokenizer"),
        ("gpt-2", "GPT2Tokenizer"),
        ("command-r", "CohereTokenizer"),
    ],
)
def test_splits_equal_transformers(pre: str, name: str) -> None:
    import transformers

    vocab = {t: i for i, t in enumerate(TOKENS)}
    theirs = getattr(transformers, name)(vocab=vocab, merges=[tuple(m.split(" ")) for m in MERGES])
    ours, r = byte_level(pre), random.Random(1)
    for _ in range(3000):
        text = "".join(r.choices(ALPHABET, k=r.randrange(1, 30)))
        assert splits(ours, text) == splits(theirs.backend_tokenizer, text), repr(text)
        assert ours.encode(text).ids == theirs.backend_tokenizer.encode(text).ids


def test_whole_words_win_over_merges_where_the_model_says_so() -> None:
    tokens = [*TOKENS, "welt"]  # a token that no merges lead to
    types = [1] * len(tokens)
    ids = [
        byte_level(pre, tokens=tokens, token_type=types).encode("welt").ids
        for pre in ("llama-bpe", "gpt-2")
    ]
    assert ids[0] == [len(TOKENS)]
    assert len(ids[1]) == 4


def test_bos_is_added_where_metadata_or_model_say_so() -> None:
    def ids(pre: str, **more: Any) -> list[int]:
        return byte_level(pre, bos_token_id=1, eos_token_id=0, **more).encode("t").ids

    t = TOKENS.index("t")
    assert ids("smollm") == [t]
    assert ids("smollm", add_bos_token=True, add_eos_token=True) == [1, t, 0]
    assert ids("llama-bpe") == [1, t]
    assert ids("llama-bpe", add_bos_token=False) == [t]


def spm_meta(pieces: dict[str, float]) -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(pieces.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def spm_pieces(seed: int) -> dict[str, float]:
    """A vocabulary as training makes one: later pieces join earlier ones and score less."""
    r = random.Random(seed)
    pieces = list("\u2581abcde")
    while len(pieces) < 60:
        joined = r.choice(pieces) + r.choice(pieces)
        if joined not in pieces and len(joined) < 8:
            pieces.append(joined)
    return {piece: -float(i) for i, piece in enumerate(pieces)}


def spm_encode(meta: dict[str, Any], text: str) -> list[int]:
    """SentencePiece's rule, written naively: join the best-scoring neighbours, leftmost first."""
    tokens, scores = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens)}
    parts = list("\u2581" + text.replace(" ", "\u2581"))
    while True:
        joins = [
            (-scores[ids[a + b]], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in ids
        ]
        if not joins:
            break
        _, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    out: list[int] = []
    for part in parts:
        out += [ids[part]] if part in ids else [3 + byte for byte in part.encode()]
    return out


@pytest.mark.parametrize("seed", range(5))
def test_sentencepiece_equals_its_rule(seed: int) -> None:
    meta = spm_meta(spm_pieces(seed))
    tokenizer, r = make(meta), random.Random(seed)
    for _ in range(300):
        text = "".join(
            r.choices("abcde \u00e9\U0001f600", [9, 9, 9, 9, 9, 5, 1, 1], k=r.randrange(1, 25))
        )
        encoded = tokenizer.encode(text)
        assert encoded.ids == [1, *spm_encode(meta, text)], repr(text)
        assert tokenizer.decode(encoded.ids) == text


def test_control_tokens_in_text_are_read_as_such() -> None:
    tokenizer = make(spm_meta(spm_pieces(0)))
    assert tokenizer.encode("a</s>b").ids.count(2) == 1


def test_runs_of_spaces_are_pieces_as_gemma_has_them() -> None:
    """The converter spells the marks of user-defined pieces as spaces; text gives them too."""
    pieces = {"\u2581": -1.0, "a": -2.0, "\u2581a": -3.0, "  ": -9.0, "   ": -9.0, "\n\n": -9.0}
    meta = spm_meta(pieces) | {"tokenizer.ggml.add_space_prefix": False}
    meta["tokenizer.ggml.token_type"][-3:] = [4, 4, 4]
    tokenizer = make(meta)
    two, three, lines = (259 + i for i in (3, 4, 5))
    a, mark, spaced = (meta["tokenizer.ggml.tokens"].index(t) for t in ("a", "\u2581", "\u2581a"))
    cases = {
        "a": [a],
        " a": [spaced],
        "  a": [two, a],
        "a    a": [a, three, spaced],
        "a\n\n\u2581\u2581a": [a, lines, two, a],
        "     ": [three, two],
        " ": [mark],
    }
    for text, expected in cases.items():
        assert tokenizer.encode(text).ids == [1, *expected], text
        assert tokenizer.decode(expected) == text.replace("\u2581", " ")


def test_control_tokens_of_phi3_take_the_spaces_behind_them() -> None:
    pieces = {"\u2581": -1.0, "a": -2.0, "\u2581a": -3.0, "<|end|>": 0.0}
    meta = spm_meta(pieces) | {"general.architecture": "phi3"}
    meta["tokenizer.ggml.token_type"][-1] = 3
    spaced, end = 261, 262

    def ids(text: str) -> list[int]:
        return make(meta).encode(text, add_special_tokens=False).ids

    assert ids("a<|end|>\n a") == [spaced, end, spaced]
    assert ids("a<s> a") == [spaced, 1, 259, spaced]
    meta["general.architecture"] = "llama"
    assert ids("a<|end|>\n a") == [spaced, end, 259, 3 + 10, spaced]


def special(meta: dict[str, Any]) -> set[str]:
    files = tokenizer_files(meta, Path("m.gguf"))
    return {t["content"] for t in files["tokenizer.json"]["added_tokens"] if t["special"]}


def test_control_tokens_typed_normal_are_found_by_name() -> None:
    more = ["<|im_start|>", "<|im_end|>", "</s>", "<\uff5cUser\uff5c>", "<|>", "<|a b|>", "<div>"]
    tokens = [*TOKENS, *more]
    meta = {"tokens": tokens, "token_type": [3, 3, 4] + [1] * (len(tokens) - 3)}
    tokenizer = byte_level("smollm", **meta)
    for name in more[:4]:
        assert tokenizer.encode(f"t{name}t").ids.count(tokens.index(name)) == 1, name
    for name in more[4:]:
        assert tokens.index(name) not in tokenizer.encode(f"t{name}t").ids, name
    files = tokenizer_files(
        {f"tokenizer.ggml.{k}": v for k, v in (META | meta).items()}, Path("m.gguf")
    )
    assert files["tokenizer_config.json"][CONTROL_BY_NAME] == more[:4], "for the log"


def test_a_word_that_merges_lead_to_stays_a_word() -> None:
    merges = [*MERGES, "< |", "| >", "<| e", "<|e n", "<|en d", "<|end |>"]
    words = ["<|", "|>", "<|e", "<|en", "<|end", "<|end|>x"]
    tokens = ["<|other|>", *TOKENS[1:], *words[:-1], "<|end|>"]
    types = [3, 3, 4] + [1] * (len(tokens) - 3)
    base = {"model": "gpt2", "tokens": tokens, "merges": merges, "pre": "gpt-2"}
    meta = {f"tokenizer.ggml.{k}": v for k, v in (base | {"token_type": types}).items()}
    assert special(meta) == {"<|other|>", "<s>"}
    # A role in the metadata is no guess.
    assert special(meta | {"tokenizer.ggml.eot_token_id": len(tokens) - 1}) >= {"<|end|>"}


def test_sentencepiece_control_tokens_typed_normal() -> None:
    meta = spm_meta(spm_pieces(0) | {"<end_of_turn>": -100.0, "<start_of_turn>": -101.0})
    assert special(meta) == {"<unk>", "<s>", "</s>", "<end_of_turn>", "<start_of_turn>"}
    meta["tokenizer.ggml.token_type"][2] = 1  # </s>, by its role
    assert "</s>" in special(meta)
    # Two pieces make it: a word.
    meta = spm_meta(spm_pieces(0) | {"<end_of_": -90.0, "turn>": -91.0, "<end_of_turn>": -100.0})
    assert special(meta) == {"<unk>", "<s>", "</s>"}


def test_user_defined_tokens_stay_text_unless_they_mark_turns() -> None:
    meta = spm_meta(spm_pieces(0) | {"<end_of_turn>": -1.0, "<think>": -1.0})
    meta["tokenizer.ggml.token_type"][-2:] = [4, 4]
    added = tokenizer_files(meta, Path("m.gguf"))["tokenizer.json"]["added_tokens"]
    assert {t["content"]: t["special"] for t in added[-2:]} == {
        "<end_of_turn>": True,
        "<think>": False,
    }


def test_tags_of_gemma_stay_text() -> None:
    meta = spm_meta(spm_pieces(0) | {"<bos>": 0.0, "<s>!": 0.0})
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    types[1] = types[2] = 4  # <s> and </s>: user-defined
    types[tokens.index("<bos>")] = 3
    meta["tokenizer.ggml.bos_token_id"] = meta["tokenizer.ggml.eos_token_id"] = tokens.index(
        "<bos>"
    )
    assert special(meta) == {"<unk>", "<bos>"}


def test_all_templates_of_the_metadata_are_kept() -> None:
    key = "tokenizer.chat_template"
    meta = spm_meta(spm_pieces(0)) | {
        key: "d",
        f"{key}.tool_use": "t",
        "tokenizer.chat_templates": [],
    }
    config = tokenizer_files(meta, Path("m.gguf"))["tokenizer_config.json"]
    assert config["chat_template"] == [
        {"name": "default", "template": "d"},
        {"name": "tool_use", "template": "t"},
    ]
    del meta[f"{key}.tool_use"]
    assert tokenizer_files(meta, Path("m.gguf"))["tokenizer_config.json"]["chat_template"] == "d"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.tokens": []}, "tokens"),
        ({"tokenizer.ggml.scores": []}, "scores"),
        ({"tokenizer.ggml.eos_token_id": 999}, "eos_token_id"),
        ({"tokenizer.ggml.model": "gpt2"}, "merges"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "duplicates"),
    ],
)
def test_what_is_missing_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        tokenizer_files(spm_meta(spm_pieces(0)) | change, Path("m.gguf"))
