"""Mixtral: a Llama whose layers have experts instead of one feed-forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.models.architecture import Architecture, TensorSpec
from engine.models.config import ConfigReader, ExpertSpec, ModelConfig
from engine.models.config_keys import decoder_fields, read_rope
from engine.models.decoder import decoder_tensors, forward
from engine.models.experts import ExpertNames, checked, gguf_expert_keys
from engine.models.gguf_metadata import GGUFMetadata

_NAME = "MixtralForCausalLM"
_NAMES = ExpertNames(
    router="block_sparse_moe.gate",
    expert="block_sparse_moe.experts.{}.",
    gate="w1",
    up="w3",
    down="w2",
)


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = decoder_fields(raw, read_rope(raw, theta=1e6))
    experts = ExpertSpec(
        number=raw.integer("num_local_experts", 8),
        per_token=raw.integer("num_experts_per_tok", 2),
        width=fields["intermediate_size"],
        layers=tuple(range(fields["num_layers"])),
        normalise=True,
    )
    window = int(raw.get("sliding_window", 0))
    return ModelConfig(_NAME, **fields, sliding_window=window, experts=checked(raw, experts))


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    # llama.cpp writes it as a Llama, with q and k reordered.
    return decoder_tensors(c, permuted_heads=True, expert_names=_NAMES)


def _gguf_keys(file: GGUFMetadata) -> dict[str, Any]:
    return gguf_expert_keys(file, "num_local_experts")


ARCHITECTURES = (
    Architecture(
        _NAME,
        "mixtral",
        _read_config,
        _tensors,
        forward,
        gguf="llama",
        gguf_experts=True,
        gguf_keys=_gguf_keys,
    ),
)
