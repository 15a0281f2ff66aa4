"""Tiny models with experts, as GGUF files."""

from __future__ import annotations

import numpy as np
import transformers

from tests.support import gguf_of
from tests.support.gguf_of import COMMON, HEAD, Case

WITHOUT_HEAD = {key: value for key, value in COMMON.items() if key != "head_dim"}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 64}
EXPERT_NUMBERS = {"expert_count": 6, "expert_used_count": 3, "expert_feed_forward_length": 64}

CASES: dict[str, Case] = {
    "mixtral": Case(
        transformers.MixtralConfig(**COMMON, num_local_experts=5, sliding_window=None),
        "llama",
        HEAD | {"rope.freq_base": 1e6, "expert_count": 5, "expert_used_count": 2},
        stored=gguf_of.permuted(6, 2),
    ),
    "qwen2 moe": Case(
        transformers.Qwen2MoeConfig(
            **WITHOUT_HEAD | EXPERTS | {"hidden_size": 192}, shared_expert_intermediate_size=96
        ),
        "qwen2moe",
        {**EXPERT_NUMBERS, "expert_shared_feed_forward_length": 96},
    ),
    "qwen3 moe": Case(
        transformers.Qwen3MoeConfig(**COMMON | EXPERTS, norm_topk_prob=True),
        "qwen3moe",
        HEAD | EXPERT_NUMBERS,
    ),
    "gpt-oss": Case(
        transformers.GptOssConfig(
            **COMMON, num_local_experts=6, num_experts_per_tok=3, sliding_window=13
        ),
        "gpt-oss",
        {
            **HEAD,
            **EXPERT_NUMBERS,
            "expert_feed_forward_length": 160,
            "attention.sliding_window": 13,
            "rope.freq_base": 150000.0,
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
        },
        {"rope.scaling.type": "yarn"},
    ),
    "glm-4.5, with a layer of MTP": Case(
        transformers.Glm4MoeConfig(
            **COMMON | {"head_dim": 64},
            use_qk_norm=True,
            attention_bias=True,
            moe_intermediate_size=64,
            n_routed_experts=6,
            num_experts_per_tok=3,
            n_group=3,
            topk_group=2,
            routed_scaling_factor=1.5,
        ),
        "glm4moe",
        {
            **EXPERT_NUMBERS,
            "block_count": 4,
            "nextn_predict_layers": 1,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "rope.dimension_count": 32,
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "expert_group_count": 3,
            "expert_group_used_count": 2,
            "expert_weights_scale": 1.5,
            "expert_gating_func": 2,
        },
        {"expert_weights_norm": True},
        extra={"blk.3.nextn.eh_proj.weight": np.zeros((96, 192), np.float32)},
    ),
}
