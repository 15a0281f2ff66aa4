"""GLM-4 (the 0414 models), dense: norms before and after, half of each head turns in pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.models.architecture import Architecture, TensorSpec
from engine.models.config import ConfigReader, ModelConfig
from engine.models.config_keys import decoder_fields, read_rope
from engine.models.decoder import Norms, decoder_tensors, forward
from engine.models.gguf_metadata import GGUFMetadata

_NAME = "Glm4ForCausalLM"
_NORMS: Norms = {
    "input_norm": ("input_layernorm", "attn_norm"),
    "out_norm": ("post_self_attn_layernorm", "post_attention_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "down_norm": ("post_mlp_layernorm", "post_ffw_norm"),
}


def _read_config(raw: ConfigReader) -> ModelConfig:
    defaults = {"head_dim": 128, "rms_norm_eps": 1.5625e-7, "num_key_value_heads": 2}
    raw = ConfigReader(defaults | dict(raw.data), raw.path)
    fields = decoder_fields(raw, read_rope(raw, partial=0.5))
    return ModelConfig(_NAME, **fields, attention_bias=bool(raw.get("attention_bias", True)))


def _gguf_keys(file: GGUFMetadata) -> dict[str, Any]:
    return {"partial_rotary_factor": file.rotary_share()}


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    return decoder_tensors(c, _NORMS, paired_rows=True, fused=("gate_up",))


ARCHITECTURES = (Architecture(_NAME, "glm4", _read_config, _tensors, forward, "glm4", _gguf_keys),)
