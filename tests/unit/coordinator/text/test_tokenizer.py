"""Tokenizer: llama.cpp's ids for the default model, unusual texts, size bounds, speed, errors."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers

from coordinator.text.tokenizer import Tokenizer
from engine.base.errors import CheckpointError
from engine.checkpoint.source import resolve
from tests.support.paths import DATA


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("smollm2").folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def recorded() -> list[dict]:
    return json.loads((DATA / "tokenization.json").read_text())


def test_equals_llama_cpp(tokenizer: Tokenizer) -> None:
    entries = recorded()
    assert len(entries) == 320
    for entry in entries:
        assert tokenizer.encode(entry["text"]) == entry["ids"], repr(entry["text"])


def test_decoding_gives_the_text_back(tokenizer: Tokenizer) -> None:
    for entry in recorded():
        assert tokenizer.decode(entry["ids"], skip_special_tokens=False) == entry["text"]


def test_numbers_of_the_default_model(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 49152
    assert tokenizer.special_ids == frozenset(range(17))
    assert tokenizer.bos == 1
    assert tokenizer.encode("<|im_end|>") == [2]
    assert tokenizer.encode("a", add_special_tokens=True) == tokenizer.encode("a", False)


def test_special_tokens_are_omitted_on_request(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
    assert tokenizer.decode(ids) == "user\nhi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>user\nhi<|im_end|>"


def test_ids_without_a_token_are_skipped(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello")
    assert tokenizer.decode([60000, *ids, 2**31]) == "hello"


def test_lone_surrogates_are_replaced(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a\ud800b\udfff") == tokenizer.encode("a\ufffdb\ufffd")
    assert tokenizer.encode("\ud83d\ude00") == tokenizer.encode("\U0001f600")


def test_min_num_tokens_is_a_lower_bound(tokenizer: Tokenizer) -> None:
    r = random.Random(0)
    texts = [entry["text"] for entry in recorded()] + [" " * 1000, "=" * 777, "\n" * 500]
    texts += ["".join(r.choices("ab =-#\n\U0001f600", k=300)) for _ in range(50)]
    for text in texts:
        assert tokenizer.min_num_tokens(text) <= len(tokenizer.encode(text))
    huge = "x" * 10_000_000
    begin = time.perf_counter()
    assert tokenizer.min_num_tokens(huge) > 8192, "can be refused without tokenizing it"
    assert time.perf_counter() - begin < 0.1


def test_large_texts(tokenizer: Tokenizer) -> None:
    text = "The quick brown fox, 1234 times.\n" * 30_000  # 1 MB
    ids = tokenizer.encode(text)
    assert len(ids) == 30_000 * len(tokenizer.encode("The quick brown fox, 1234 times.\n"))
    assert tokenizer.decode(ids) == text


def test_loads_fast_and_without_torch(folder: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from coordinator.text.tokenizer import Tokenizer
begin = time.process_time()  # other processes may be using the machine
Tokenizer.load(Path(sys.argv[1])).encode("hello")
seconds = time.process_time() - begin
assert not {"torch", "transformers", "numpy", "gguf"} & set(sys.modules)
print(seconds)
"""
    command = [sys.executable, "-c", code, str(folder)]
    runs = [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in "ab"]
    assert min(runs) < 0.5


def test_refusals_name_the_file(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*missing"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json.*not a tokenizer"):
        Tokenizer.load(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(CheckpointError, match="WordPiece"):
        Tokenizer.load(tmp_path)


def test_no_bound_if_a_token_may_match_any_amount_of_text(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())

    def bound() -> int:
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        return Tokenizer.load(tmp_path).min_num_tokens("\u0344" * 8100)

    assert bound() == 100
    spec["normalizer"] = {"type": "NFC"}
    assert bound() == 25
    spec["normalizer"] = {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}
    assert bound() == 0
    spec["normalizer"] = None
    spec["added_tokens"][3]["lstrip"] = True
    assert bound() == 0


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_the_longest_token_of_a_unigram_model(byte_fallback: bool) -> None:
    vocab = [("<unk>", 0.0), ("\u2581", -1.0), ("\u2581aaaa", -1.0)]
    vocab += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram(vocab, 0, byte_fallback))
    library.decoder = tokenizers.decoders.Metaspace()
    spec = json.loads(library.to_str())
    tokenizer = Tokenizer.of(library, spec, Path("x"), vocab_size=300, bos=None)
    text = "\u2581aaaa" * 100
    assert tokenizer.min_num_tokens(text) == (84 if byte_fallback else 0)
    assert len(tokenizer.encode(text)) == 100
