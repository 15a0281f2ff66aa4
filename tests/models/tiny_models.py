"""A tiny random model of each architecture, and one of each packing, as users pass them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from engine.checkpoint.gguf_tokenizer import tokenizer_files
from tests.support import dense_models, tiny_gguf
from tests.support.dense_models import COMMON
from tests.support.packed_rows import random_rows

_HEADS = COMMON | {"head_dim": 32}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1}
# By the architecture's name; tests/unit/engine/runner compares more of each with transformers.
ARCHITECTURES: dict[str, transformers.PretrainedConfig] = {
    "LlamaForCausalLM": transformers.LlamaConfig(**COMMON, tie_word_embeddings=True),
    "Qwen2ForCausalLM": transformers.Qwen2Config(**COMMON, **_SOME_WINDOWS),
    "Qwen3ForCausalLM": transformers.Qwen3Config(**_HEADS),
    "MistralForCausalLM": transformers.MistralConfig(**COMMON, sliding_window=13),
    "MinistralForCausalLM": dense_models.MODELS["ministral"],
    "Ministral3ForCausalLM": dense_models.MODELS["ministral 3"],
    "Gemma2ForCausalLM": transformers.Gemma2Config(**_HEADS, sliding_window=13),
    "Gemma3ForCausalLM": transformers.Gemma3TextConfig(**_HEADS, sliding_window=13),
    "Phi3ForCausalLM": dense_models.MODELS["phi 3, window"],
    "SmolLM3ForCausalLM": dense_models.MODELS["smollm3"],
    "GraniteForCausalLM": dense_models.MODELS["granite"],
    "Olmo2ForCausalLM": dense_models.MODELS["olmo 2"],
    "Olmo3ForCausalLM": dense_models.MODELS["olmo 3"],
    "Exaone4ForCausalLM": dense_models.MODELS["exaone 4"],
    "Glm4ForCausalLM": dense_models.MODELS["glm 4"],
    "MixtralForCausalLM": transformers.MixtralConfig(**_HEADS, num_local_experts=5),
    "Qwen2MoeForCausalLM": transformers.Qwen2MoeConfig(
        **COMMON | _EXPERTS, shared_expert_intermediate_size=96, mlp_only_layers=[0]
    ),
    "Qwen3MoeForCausalLM": transformers.Qwen3MoeConfig(**_HEADS | _EXPERTS, norm_topk_prob=True),
    "GptOssForCausalLM": transformers.GptOssConfig(
        **_HEADS, num_local_experts=5, num_experts_per_tok=3, sliding_window=13
    ),
    "Glm4MoeForCausalLM": transformers.Glm4MoeConfig(
        **COMMON | {"head_dim": 64},  # half of it turns
        moe_intermediate_size=64,
        n_routed_experts=6,
        num_experts_per_tok=2,
        num_nextn_predict_layers=0,
    ),
}
# What a GGUF file keeps packed, by the format's name; Q4_K_M files have several of them.
PACKINGS = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"),
    *("mxfp4", "f16", "f32"),
)
MIXED = "q4_k + q6_k"  # q and k of one type, v of another, as Q4_K_M files have them
_WIDTH = 256  # K-quants have blocks of 256


def write_folder(folder: Path, config: transformers.PretrainedConfig) -> Path:
    """A folder in Hugging Face layout, with random weights."""
    torch.manual_seed(3)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15)
    model.save_pretrained(folder)
    tokens, merges = tiny_gguf.byte_level_vocab()
    keys = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "merges": merges}
    meta = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    for name, content in tokenizer_files(meta, folder).items():
        (folder / name).write_text(json.dumps(content))
    return folder


def write_packed(path: Path, packing: str) -> Path:
    """A GGUF file of a Llama whose matrices are packed so."""
    rng = np.random.default_rng(7)
    num_tokens = len(tiny_gguf.byte_level_vocab()[0])
    shapes = {"token_embd": (num_tokens, _WIDTH)}
    norms = {"output_norm.weight": np.ones(_WIDTH, np.float32)}
    for layer in range(2):
        block = f"blk.{layer}"
        shapes |= {f"{block}.attn_{part}": (_WIDTH, _WIDTH) for part in ("q", "k", "v", "output")}
        shapes |= {f"{block}.ffn_{part}": (_WIDTH, _WIDTH) for part in ("gate", "up", "down")}
        for part in ("attn_norm", "ffn_norm"):
            norms[f"{block}.{part}.weight"] = np.ones(_WIDTH, np.float32)
    packed, plain = {}, dict(norms)
    for name, (rows, columns) in shapes.items():
        kind = packing
        if packing == MIXED:
            kind = "q6_k" if name.endswith(("attn_v", "ffn_down", "token_embd")) else "q4_k"
        if kind in ("f16", "f32"):
            values = rng.standard_normal((rows, columns), dtype=np.float32) * 0.15
            plain[f"{name}.weight"] = values.astype(np.float16 if kind == "f16" else np.float32)
        else:
            packed[f"{name}.weight"] = (kind, random_rows(kind, rows, columns, rng, 0.15))
    numbers = tiny_gguf.NUMBERS | {"embedding_length": _WIDTH, "feed_forward_length": _WIDTH}
    numbers |= {"attention.head_count_kv": 4}
    return tiny_gguf.write(path, arch="llama", numbers=numbers, tensors=plain, packed=packed)


def named_types(path: Path) -> set[str]:
    """The types of a file's tensors, for a check that it is what it should be."""
    return {t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}
