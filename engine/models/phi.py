"""Phi-3 and Phi-4: q, k and v are one tensor of a checkpoint, and so are gate and up.

Phi-4-mini rotates a part of each head; models for long texts stretch by LongRoPE.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.models.architecture import Architecture, TensorSpec
from engine.models.config import ConfigReader, ModelConfig
from engine.models.config_keys import decoder_fields, read_rope
from engine.models.decoder import decoder_tensors, forward
from engine.models.gguf_metadata import GGUFMetadata

_NAME = "Phi3ForCausalLM"


def _read_config(raw: ConfigReader) -> ModelConfig:
    defaults = {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    raw = ConfigReader(defaults | dict(raw.data), raw.path)
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling")
    if isinstance(scaling, dict) and "yarn" in (scaling.get("rope_type"), scaling.get("type")):
        # So the first files name LongRoPE.
        longrope = {**scaling, "rope_type": "longrope"}
        raw = ConfigReader({**raw.data, "rope_parameters": longrope}, raw.path)
    fields = decoder_fields(raw, read_rope(raw, partial=1.0))
    return ModelConfig(_NAME, **fields, sliding_window=int(raw.get("sliding_window", 0)))


def _gguf_keys(file: GGUFMetadata) -> dict[str, Any]:
    """LongRoPE's factors are tensors of the file; which scaling it is the file does not name."""
    context = file.integer("context_length")
    original = file.integer("rope.scaling.original_context_length", context)
    keys: dict[str, Any] = {
        "sliding_window": file.get("attention.sliding_window") or None,
        "partial_rotary_factor": file.rotary_share(),
        "original_max_position_embeddings": original,
    }
    if "rope_factors_long.weight" in file.rope_factors:
        factors = {
            f"{length}_factor": list(file.rope_factors[f"rope_factors_{length}.weight"])
            for length in ("long", "short")
        }
        keys["rope_scaling"] = {"rope_type": "longrope", **factors}
    return keys


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    return decoder_tensors(c, fused=("qkv", "gate_up"))


ARCHITECTURES = (Architecture(_NAME, "phi3", _read_config, _tensors, forward, "phi3", _gguf_keys),)
