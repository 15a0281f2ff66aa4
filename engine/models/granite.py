"""Granite, dense: a Llama with scales of embeddings, scores, sums and logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.models.architecture import Architecture, TensorSpec
from engine.models.config import ConfigReader, ModelConfig
from engine.models.config_keys import decoder_fields
from engine.models.decoder import decoder_tensors, forward
from engine.models.gguf_metadata import GGUFMetadata

_NAME = "GraniteForCausalLM"
# Key of config.json -> key of a GGUF file. Each is 1 where it is absent.
_SCALES = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def _read_config(raw: ConfigReader) -> ModelConfig:
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        _NAME,
        **decoder_fields(raw),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        embedding_scale=raw.number("embedding_multiplier", 1.0),
        attention_scale=raw.number("attention_multiplier", 1.0),
        residual_scale=raw.number("residual_multiplier", 1.0),
        logit_scale=1.0 / raw.number("logits_scaling", 1.0),
    )


def _gguf_keys(file: GGUFMetadata) -> dict[str, Any]:
    return {key: file.number(name, 1.0) for key, name in _SCALES.items()}


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    return decoder_tensors(c, permuted_heads=True)


ARCHITECTURES = (
    Architecture(_NAME, "granite", _read_config, _tensors, forward, "granite", _gguf_keys),
)
