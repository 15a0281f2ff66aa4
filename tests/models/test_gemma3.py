"""Gemma 3 270M (Q4_K_M): fp32 against transformers, packed weights against fp32, and a real stack.

Its layers have windows of 512 tokens, two rotary tables and norms before and after; its file has
Q4_K, Q5_0, Q6_K and Q8_0.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from coordinator.text.tokenizer import Tokenizer
from engine.checkpoint.source import Checkpoint, resolve, weights
from tests.models.downloads import llamacpp_source
from tests.models.real_model import exact, greedy, packed, perplexity
from tests.support.stack import Stack

pytestmark = pytest.mark.timeout(1200)
NUM_TOKENS = 48
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Die Hauptstadt von Deutschland ist",
    "1, 2, 3, 4, 5, 6, 7,",
    "<start_of_turn>user\nName three fruits.<end_of_turn>\n<start_of_turn>model\n",
]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return resolve("gemma3-270m")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer.load(checkpoint.folder)


def prose() -> str:
    """A fixed text: a page of llama.cpp's documentation."""
    return (llamacpp_source() / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Short ones, and one that is longer than the windows."""
    return [tokenizer.encode(text) for text in PROMPTS] + [tokenizer.encode(prose())[:700]]


def test_greedy_tokens_equal_transformers(
    checkpoint: Checkpoint, prompts: list[list[int]], tmp_path: Path
) -> None:
    import transformers

    (tmp_path / "config.json").symlink_to(checkpoint.folder / "config.json")
    (shard,) = weights(checkpoint, "float32")
    (tmp_path / "model.safetensors").symlink_to(shard)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert type(reference).__name__ == "Gemma3ForCausalLM"
    model = exact(checkpoint)
    for prompt in prompts:
        with torch.inference_mode():
            out = reference.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert greedy(model, prompt, NUM_TOKENS) == out[0, len(prompt) :].tolist()


def test_perplexity_of_packed_weights_is_that_of_fp32(
    checkpoint: Checkpoint, tokenizer: Tokenizer
) -> None:
    token_ids = tokenizer.encode(prose())[:2048]
    assert len(token_ids) == 2048
    in_fp32, in_packing = (perplexity(m(checkpoint), token_ids) for m in (exact, packed))
    print(f"perplexity: fp32 {in_fp32:.4f}, packed {in_packing:.4f}")
    assert abs(in_packing / in_fp32 - 1) < 0.005


def test_a_stack_with_drafts_equals_one_process(
    checkpoint: Checkpoint, prompts: list[list[int]], tmp_path: Path
) -> None:
    model = packed(checkpoint)
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    del model
    flags = ("--model", "gemma3-270m", "--max-model-len", "2048", "--drafter", "ngram")
    with Stack(tmp_path, *flags) as stack:
        for prompt, tokens in zip(prompts, expected, strict=True):
            found, _, _ = stack.generate(prompt, max_tokens=NUM_TOKENS, ignore_eos=True)
            assert found == tokens
        seen = stack.metrics("decode")
        assert seen["diptych_kv_transfer_blocks_total"] >= 700 // 16
        assert seen["diptych_spec_decode_num_accepted_tokens_total"] > 0
        stack.assert_at_rest()
