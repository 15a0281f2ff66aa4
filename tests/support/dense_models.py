"""Tiny configurations of dense architectures, in widths that the CPU kernels take."""

from __future__ import annotations

from typing import Any

import transformers

from tests.support import gguf_of

COMMON: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "vocab_size": gguf_of.VOCAB,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": None,
}
FOUR = COMMON | {"num_hidden_layers": 4}
WIDE = COMMON | {"hidden_size": 128, "num_attention_heads": 2}  # heads of 64
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
NO_ROPE_LAYERS = [1, 0, 1, 0]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
LONG = [1.0 + 0.25 * i for i in range(32)]
SHORT = [1.0 + 0.0625 * i for i in range(32)]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": LONG[:16],
    "short_factor": SHORT[:16],
    "original_max_position_embeddings": 4,
}
# Half of a head of 64 turns, and texts are longer than the original context.
PHI4_MINI = transformers.Phi3Config(
    **WIDE,
    tie_word_embeddings=True,
    original_max_position_embeddings=4,
    rope_parameters={**LONGROPE, "partial_rotary_factor": 0.5},
)
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
GRANITE_SCALES: dict[str, Any] = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.125,
    "residual_multiplier": 0.25,
    "logits_scaling": 8.0,
}

MODELS: dict[str, transformers.PretrainedConfig] = {
    "phi 3, window": transformers.Phi3Config(**COMMON, sliding_window=13),
    "phi 3, longrope": transformers.Phi3Config(
        **COMMON, original_max_position_embeddings=4, rope_parameters=LONGROPE
    ),
    "phi 4 mini": PHI4_MINI,
    "smollm3": transformers.SmolLM3Config(**FOUR),
    "smollm3, windows, biases": transformers.SmolLM3Config(
        **FOUR,
        no_rope_layers=NO_ROPE_LAYERS,
        use_sliding_window=True,
        sliding_window=13,
        attention_bias=True,
        mlp_bias=True,
    ),
    "granite": transformers.GraniteConfig(**COMMON, **GRANITE_SCALES, tie_word_embeddings=True),
    "olmo 2": transformers.Olmo2Config(**COMMON | {"num_key_value_heads": 3}),
    "olmo 3": transformers.Olmo3Config(
        **COMMON,
        sliding_window=13,
        layer_types=KINDS[2:],
        rope_parameters={
            "full_attention": YARN | {"attention_factor": 1.25},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
    "glm 4": transformers.Glm4Config(**WIDE, head_dim=64),
    "glm 4, no biases, all of a head": transformers.Glm4Config(
        **COMMON,
        head_dim=32,
        attention_bias=False,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
    ),
    "exaone 4": transformers.Exaone4Config(**FOUR, sliding_window=13),
    "exaone 4, no windows": transformers.Exaone4Config(
        **COMMON, sliding_window=None, layer_types=["full_attention"] * 2
    ),
    "ministral": transformers.MinistralConfig(
        **FOUR, head_dim=32, sliding_window=13, layer_types=KINDS
    ),
    "ministral 3": transformers.Ministral3Config(
        **COMMON, head_dim=32, rope_parameters=MINISTRAL3_ROPE
    ),
    "llama, proportional rope": transformers.LlamaConfig(
        **COMMON,
        rope_parameters={
            "rope_type": "proportional",
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.5,
            "factor": 2.0,
        },
    ),
    "llama, longrope": transformers.LlamaConfig(**COMMON, rope_parameters=LONGROPE),
}
