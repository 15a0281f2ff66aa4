"""Qwen2 and Qwen3 with experts.

Qwen2's layers also have a part that every token takes, weighted by a sigmoid. Some layers may have
a plain feed-forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from engine.models.architecture import Architecture, TensorSpec
from engine.models.config import ConfigReader, ExpertSpec, ModelConfig
from engine.models.config_keys import attention_kinds, decoder_fields
from engine.models.decoder import HEAD_NORMS, PRE_NORMS, decoder_tensors, forward
from engine.models.experts import ExpertNames, checked, gguf_expert_keys
from engine.models.gguf_metadata import GGUFMetadata

QWEN2, QWEN3 = "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"
_FULL, _WINDOW = "full_attention", "sliding_attention"


def _experts(raw: ConfigReader, number: int, per_token: int, width: int) -> ExpertSpec:
    """What both have; the numbers are the defaults."""
    step = raw.integer("decoder_sparse_step", 1)
    dense = raw.get("mlp_only_layers", [])
    layers = range(raw.integer("num_hidden_layers"))
    return ExpertSpec(
        number=raw.integer("num_experts", raw.integer("num_local_experts", number)),
        per_token=raw.integer("num_experts_per_tok", per_token),
        width=raw.integer("moe_intermediate_size", width),
        layers=tuple(i for i in layers if i not in dense and (i + 1) % step == 0),
        normalise=bool(raw.get("norm_topk_prob", False)),
    )


def _qwen2_windows(raw: ConfigReader) -> dict[str, Any]:
    """Every second layer of the first `max_window_layers` has a window, where it is switched on."""
    if not raw.get("use_sliding_window", False):
        return {}
    last, window = int(raw.get("max_window_layers", 28)), raw.integer("sliding_window", 4096)
    layers = range(raw.integer("num_hidden_layers"))
    default = [_WINDOW if i % 2 == 0 and i < last else _FULL for i in layers]
    kinds = attention_kinds(raw, default)
    return {"layer_windows": tuple(0 if kind == _FULL else window for kind in kinds)}


def _read_qwen2(raw: ConfigReader) -> ModelConfig:
    experts = dataclasses.replace(
        _experts(raw, 60, 4, 1408),
        shared_width=raw.integer("shared_expert_intermediate_size", 5632),
        shared_gated=True,
    )
    bias = bool(raw.get("qkv_bias", True))
    windows = _qwen2_windows(raw)
    return ModelConfig(
        QWEN2, **decoder_fields(raw), attention_bias=bias, experts=checked(raw, experts), **windows
    )


def _read_qwen3(raw: ConfigReader) -> ModelConfig:
    bias = bool(raw.get("attention_bias", False))
    is_windowed = raw.get("use_sliding_window", False)
    return ModelConfig(
        QWEN3,
        **decoder_fields(raw) | {"head_dim": raw.integer("head_dim", 128)},
        attention_bias=bias,
        output_bias=bias,
        sliding_window=raw.integer("sliding_window", 4096) if is_windowed else 0,
        experts=checked(raw, _experts(raw, 128, 8, 768)),
    )


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    norms = PRE_NORMS if c.architecture == QWEN2 else {**PRE_NORMS, **HEAD_NORMS}
    return decoder_tensors(c, norms, expert_names=ExpertNames())


def _gguf_qwen2(file: GGUFMetadata) -> dict[str, Any]:
    inner, experts = file.integer("feed_forward_length"), gguf_expert_keys(file)
    width = inner // experts["num_experts_per_tok"]
    return experts | {
        "moe_intermediate_size": file.integer("expert_feed_forward_length", width),
        "shared_expert_intermediate_size": file.integer("expert_shared_feed_forward_length", inner),
        "qkv_bias": "blk.0.attn_q.bias" in file.shapes,
    }


def _gguf_qwen3(file: GGUFMetadata) -> dict[str, Any]:
    """The format's weights of experts are always divided by their sum."""
    width = file.integer("expert_feed_forward_length")
    return gguf_expert_keys(file) | {"moe_intermediate_size": width, "norm_topk_prob": True}


ARCHITECTURES = (
    Architecture(
        QWEN2,
        "qwen2_moe",
        _read_qwen2,
        _tensors,
        forward,
        gguf="qwen2moe",
        gguf_experts=True,
        gguf_keys=_gguf_qwen2,
    ),
    Architecture(
        QWEN3,
        "qwen3_moe",
        _read_qwen3,
        _tensors,
        forward,
        gguf="qwen3moe",
        gguf_experts=True,
        gguf_keys=_gguf_qwen3,
    ),
)
