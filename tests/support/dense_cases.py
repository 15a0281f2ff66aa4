"""Tiny models of dense architectures, and what llama.cpp's converter makes of them."""

from __future__ import annotations

import math

import numpy as np
import transformers

from tests.support import dense_models, gguf_of
from tests.support.gguf_of import COMMON, HEAD, Case

DENSE = dense_models.MODELS
LONGROPE_ATTENTION = math.sqrt(1 + math.log(1024 / 4) / math.log(4))  # as the converter has it

CASES: dict[str, Case] = {
    "llama": Case(
        transformers.LlamaConfig(**COMMON, tie_word_embeddings=True),
        "llama",
        HEAD | {"rope.freq_base": 10000.0},
        stored=gguf_of.permuted(6, 2),
    ),
    "qwen2": Case(
        transformers.Qwen2Config(**dense_models.COMMON), "qwen2", {"rope.freq_base": 10000.0}
    ),
    "qwen3": Case(
        transformers.Qwen3Config(**COMMON, tie_word_embeddings=True),
        "qwen3",
        HEAD | {"rope.freq_base": 10000.0},
    ),
    "gemma 2": Case(
        transformers.Gemma2Config(**COMMON, sliding_window=13, query_pre_attn_scalar=32),
        "gemma2",
        {
            **HEAD,
            "attention.sliding_window": 13,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        stored=gguf_of.norms_plus_one,
    ),
    "gemma 3": Case(
        transformers.Gemma3TextConfig(
            **COMMON | {"num_hidden_layers": 7}, sliding_window=13, query_pre_attn_scalar=32
        ),
        "gemma3",
        HEAD | {"attention.sliding_window": 13, "rope.freq_base": 1e6},
        stored=gguf_of.norms_plus_one,
    ),
    "gemma 3, scaled, windows by a list": Case(
        transformers.Gemma3TextConfig(
            **COMMON,
            sliding_window=13,
            query_pre_attn_scalar=32,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
        ),
        "gemma3",
        {
            **HEAD,
            "attention.sliding_window": 13,
            "rope.freq_base": 1e6,
            "rope.freq_base_swa": 500.0,
            "rope.scaling.factor": 8.0,
        },
        {"attention.sliding_window_pattern": [False, True, False]},
        stored=gguf_of.norms_plus_one,
    ),
    "phi 3, window": Case(
        DENSE["phi 3, window"],
        "phi3",
        {
            "rope.dimension_count": 32,
            "rope.freq_base": 10000.0,
            "rope.scaling.original_context_length": 4096,
            "attention.sliding_window": 13,
        },
    ),
    "phi 4 mini": Case(
        DENSE["phi 4 mini"],
        "phi3",
        {
            "rope.dimension_count": 32,
            "rope.freq_base": 10000.0,
            "rope.scaling.original_context_length": 4,
            "rope.scaling.attn_factor": LONGROPE_ATTENTION,
            "attention.sliding_window": 0,
        },
        extra={
            "rope_factors_long.weight": np.array(dense_models.LONG[:16], np.float32),
            "rope_factors_short.weight": np.array(dense_models.SHORT[:16], np.float32),
        },
    ),
    "smollm3": Case(
        DENSE["smollm3"],
        "smollm3",
        {"rope.freq_base": 2e6, "rope.dimension_count": 32},
        stored=gguf_of.permuted(3, 1),
    ),
    "granite": Case(
        DENSE["granite"],
        "granite",
        {
            "rope.freq_base": 10000.0,
            "rope.dimension_count": 32,
            "embedding_scale": 12.0,
            "attention.scale": 0.125,
            "residual_scale": 0.25,
            "logit_scale": 8.0,
        },
        stored=gguf_of.permuted(3, 1),
    ),
    "olmo 2": Case(DENSE["olmo 2"], "olmo2", {"rope.freq_base": 10000.0}),
    "olmo 3": Case(
        DENSE["olmo 3"],
        "olmo2",
        {
            "rope.freq_base": 1000.0,
            "rope.freq_base_swa": 1000.0,
            "rope.scaling.factor": 4.0,
            "rope.scaling.yarn_attn_factor": 1.25,
            "rope.scaling.original_context_length": 256,
            "attention.sliding_window": 13,
        },
        {
            "rope.scaling.type": "yarn",
            "attention.sliding_window_pattern": [True, False],
        },
    ),
    "glm 4": Case(
        DENSE["glm 4"],
        "glm4",
        {
            "attention.key_length": 64,
            "attention.value_length": 64,
            "rope.freq_base": 10000.0,
            "rope.dimension_count": 32,
        },
    ),
    "exaone 4": Case(
        DENSE["exaone 4"],
        "exaone4",
        {"rope.freq_base": 10000.0, "attention.sliding_window": 13},
        {"attention.sliding_window_pattern": [True, True, True, False]},
    ),
    "exaone 4, no windows": Case(
        DENSE["exaone 4, no windows"], "exaone4", {"rope.freq_base": 10000.0}
    ),
    "ministral 3": Case(
        DENSE["ministral 3"],
        "mistral3",
        {
            **HEAD,
            "rope.freq_base": 1000.0,
            "rope.dimension_count": 32,
            "rope.scaling.factor": 16.0,
            "rope.scaling.original_context_length": 16,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.1,
        },
        {"rope.scaling.type": "yarn"},
        stored=gguf_of.permuted(3, 1),
    ),
    "mistral, of a vision model": Case(
        transformers.MistralConfig(**COMMON, sliding_window=None),
        "mistral3",
        HEAD | {"rope.freq_base": 10000.0, "rope.dimension_count": 32},
        stored=gguf_of.permuted(6, 2),
    ),
}
