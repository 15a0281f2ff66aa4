"""gpt-oss: experts with biases and clamped gates, attention sinks, a window in every second layer.

Files in Hugging Face layout hold all experts of a layer in one tensor, where gate and up alternate;
those that were published are quantised as MXFP4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.models.architecture import Architecture, TensorSpec
from engine.models.config import ConfigReader, ExpertSpec, ModelConfig
from engine.models.config_keys import attention_kinds, decoder_fields, read_rope
from engine.models.decoder import Norms, decoder_tensors, forward
from engine.models.experts import ExpertNames, checked, gguf_expert_keys
from engine.models.gguf_metadata import GGUFMetadata

_NAME = "GptOssForCausalLM"
_FULL, _WINDOW = "full_attention", "sliding_attention"
_NORMS: Norms = {
    "input_norm": ("input_layernorm", "attn_norm"),
    "mlp_norm": ("post_attention_layernorm", "post_attention_norm"),
}
_NAMES = ExpertNames(router="mlp.router", interleaved=True)
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read_config(raw: ConfigReader) -> ModelConfig:
    data = {"head_dim": 64, "rms_norm_eps": 1e-5, **raw.data}
    if not (raw.get("rope_parameters") or raw.get("rope_scaling")):
        data["rope_scaling"] = _YARN
    raw = ConfigReader(data, raw.path)
    fields = decoder_fields(raw, read_rope(raw, theta=150000.0))
    layers, window = range(fields["num_layers"]), raw.integer("sliding_window", 128)
    kinds = attention_kinds(raw, [_WINDOW if i % 2 == 0 else _FULL for i in layers])
    bias = bool(raw.get("attention_bias", True))
    experts = ExpertSpec(
        number=raw.integer("num_local_experts", raw.integer("num_experts", 128)),
        per_token=raw.integer("num_experts_per_tok", 4),
        width=fields["intermediate_size"],
        layers=tuple(layers),
        normalise=True,  # as a softmax of the taken ones is
        biased=True,
        limit=raw.number("swiglu_limit", 7.0),
        alpha=raw.number("swiglu_alpha", 1.702),
    )
    return ModelConfig(
        _NAME,
        **fields,
        attention_bias=bias,
        output_bias=bias,
        layer_windows=tuple(0 if kind == _FULL else window for kind in kinds),
        experts=checked(raw, experts),
        attention_sinks=True,
    )


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    return decoder_tensors(c, _NORMS, expert_names=_NAMES)


def _gguf_keys(file: GGUFMetadata) -> dict[str, Any]:
    """The format leaves out that the ramp of YaRN begins and ends between dimensions."""
    rope = _YARN | {
        "factor": file.number("rope.scaling.factor", 1.0),
        "original_max_position_embeddings": file.integer("rope.scaling.original_context_length"),
        "beta_fast": file.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": file.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    return gguf_expert_keys(file, "num_local_experts") | {
        "intermediate_size": file.integer("expert_feed_forward_length"),
        "sliding_window": file.integer("attention.sliding_window"),
        "rope_scaling": rope,
    }


ARCHITECTURES = (
    Architecture(
        _NAME,
        "gpt_oss",
        _read_config,
        _tensors,
        forward,
        gguf="gpt-oss",
        gguf_experts=True,
        gguf_keys=_gguf_keys,
        quantisations=("mxfp4",),
    ),
)
