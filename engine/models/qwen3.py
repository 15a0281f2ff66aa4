"""Qwen3, dense: each head of q and k is normalised before it is rotated."""

from __future__ import annotations

from collections.abc import Iterator

from engine.models.architecture import Architecture, TensorSpec
from engine.models.config import ConfigReader, ModelConfig
from engine.models.config_keys import decoder_fields, qwen_windows
from engine.models.decoder import HEAD_NORMS, PRE_NORMS, decoder_tensors, forward

_NAME, _HEAD_DIM = "Qwen3ForCausalLM", 128


def _read_config(raw: ConfigReader) -> ModelConfig:
    bias = bool(raw.get("attention_bias", False))
    fields = decoder_fields(raw) | {"head_dim": raw.integer("head_dim", _HEAD_DIM)}
    windows = qwen_windows(raw)
    return ModelConfig(_NAME, **fields, attention_bias=bias, output_bias=bias, **windows)


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    return decoder_tensors(c, {**PRE_NORMS, **HEAD_NORMS})


ARCHITECTURES = (Architecture(_NAME, "qwen3", _read_config, _tensors, forward, gguf="qwen3"),)
