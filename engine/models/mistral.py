"""Mistral, and Ministral with windows in some layers or with queries that grow.

Queries of Ministral 3 are multiplied by a number that grows with the logarithm of their position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.models.architecture import Architecture, TensorSpec
from engine.models.config import ConfigReader, ModelConfig
from engine.models.config_keys import (
    FULL,
    WINDOW,
    attention_kinds,
    decoder_fields,
    layer_windows,
)
from engine.models.decoder import decoder_tensors, forward
from engine.models.gguf_metadata import GGUFMetadata

MISTRAL, MINISTRAL = "MistralForCausalLM", "MinistralForCausalLM"
MINISTRAL3 = "Ministral3ForCausalLM"


def _read_mistral(raw: ConfigReader) -> ModelConfig:
    # An absent key means the architecture's default; only a null means full attention.
    window = raw.data.get("sliding_window", 4096)
    return ModelConfig(MISTRAL, **decoder_fields(raw), sliding_window=int(window or 0))


def _read_ministral(raw: ConfigReader) -> ModelConfig:
    fields, window = decoder_fields(raw), int(raw.data.get("sliding_window", 4096) or 0)
    kinds = attention_kinds(raw, [WINDOW if window else FULL] * fields["num_layers"])
    return ModelConfig(MINISTRAL, **fields, **layer_windows(kinds, window))


def _read_ministral3(raw: ConfigReader) -> ModelConfig:
    raw = ConfigReader({"head_dim": 128, "rms_norm_eps": 1e-5, **raw.data}, raw.path)
    fields = decoder_fields(raw)
    keys = ConfigReader(raw.get("rope_parameters") or raw.get("rope_scaling") or {}, raw.path)
    growth = {}
    if keys.get("llama_4_scaling_beta"):
        original = fields["rope_scaling"].original_max_position_embeddings
        beta = keys.number("llama_4_scaling_beta")
        growth = {"query_beta": beta, "query_period": original}
    window = int(raw.get("sliding_window", 0))
    return ModelConfig(MINISTRAL3, **fields, **growth, sliding_window=window)


def _gguf_keys(file: GGUFMetadata) -> dict[str, Any]:
    """The format's `mistral3` is Ministral 3, or else a Mistral out of a vision model."""
    if not (beta := file.get("attention.temperature_scale")):
        return {"architectures": [MISTRAL], "model_type": "mistral", "sliding_window": None}
    rope = {
        "rope_type": "yarn",
        "rope_theta": file.number("rope.freq_base", 10000.0),
        "factor": file.number("rope.scaling.factor", 1.0),
        "original_max_position_embeddings": file.integer("rope.scaling.original_context_length"),
        "beta_fast": file.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": file.number("rope.scaling.yarn_beta_slow", 1.0),
        "mscale": 1.0,
        "mscale_all_dim": file.number("rope.scaling.yarn_log_multiplier", 1.0),
        "llama_4_scaling_beta": beta,
    }
    return {"rope_parameters": rope, "rope_scaling": None}


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    return decoder_tensors(c, permuted_heads=True)


ARCHITECTURES = (
    Architecture(MISTRAL, "mistral", _read_mistral, _tensors, forward),
    Architecture(MINISTRAL, "ministral", _read_ministral, _tensors, forward),
    Architecture(
        *(MINISTRAL3, "ministral3", _read_ministral3, _tensors, forward, "mistral3", _gguf_keys)
    ),
)
