"""SmolLM3: a Llama in which every fourth layer does not rotate."""

from __future__ import annotations

from collections.abc import Iterator

from engine.models.architecture import Architecture, TensorSpec
from engine.models.config import NO_ROPE, ConfigReader, ModelConfig
from engine.models.config_keys import (
    FULL,
    WINDOW,
    attention_kinds,
    decoder_fields,
    layer_windows,
    read_rope,
)
from engine.models.decoder import decoder_tensors, forward

_NAME = "SmolLM3ForCausalLM"


def _read_config(raw: ConfigReader) -> ModelConfig:
    defaults = {"tie_word_embeddings": True, "num_key_value_heads": 4}
    raw = ConfigReader(defaults | dict(raw.data), raw.path)
    fields = decoder_fields(raw, read_rope(raw, theta=2e6))
    num_layers, interval = fields["num_layers"], raw.integer("no_rope_layer_interval", 4)
    turns = raw.get("no_rope_layers", [(i + 1) % interval for i in range(num_layers)])
    if not isinstance(turns, list) or len(turns) < num_layers:
        raise raw.refuse("no_rope_layers", turns, f"expected {num_layers} times 0 or 1")
    turns = turns[:num_layers]
    window = int(raw.get("sliding_window", 0)) if raw.get("use_sliding_window") else 0
    default = [WINDOW if window and not turn else FULL for turn in turns]
    windows = layer_windows(attention_kinds(raw, default), window)
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        _NAME,
        **fields,
        **windows,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        layer_ropes=tuple(0 if turn else NO_ROPE for turn in turns),
    )


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    return decoder_tensors(c, permuted_heads=True)


ARCHITECTURES = (Architecture(_NAME, "smollm3", _read_config, _tensors, forward, "smollm3"),)
