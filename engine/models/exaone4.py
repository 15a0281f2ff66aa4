"""EXAONE 4: norms stand after attention and feed-forward; layers that see everything do not rotate.

The smaller models have no windows; then every layer rotates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.models.architecture import Architecture, TensorSpec
from engine.models.config import NO_ROPE, ConfigReader, ModelConfig
from engine.models.config_keys import FULL, WINDOW, attention_kinds, decoder_fields, layer_windows
from engine.models.decoder import HEAD_NORMS, POST_NORMS, decoder_tensors, forward
from engine.models.gguf_metadata import GGUFMetadata

_NAME = "Exaone4ForCausalLM"


def _read_config(raw: ConfigReader) -> ModelConfig:
    raw = ConfigReader({"rms_norm_eps": 1e-5, **raw.data}, raw.path)
    fields, window = decoder_fields(raw), int(raw.data.get("sliding_window", 4096) or 0)
    default = [FULL] * fields["num_layers"]
    if window and raw.get("layer_types") is None:
        period = raw.integer("sliding_window_pattern", 4)
        default = [WINDOW if (i + 1) % period else FULL for i in range(len(default))]
    kinds = attention_kinds(raw, default)
    ropes = tuple(NO_ROPE if window and kind == FULL else 0 for kind in kinds)
    layer_ropes = ropes if NO_ROPE in ropes else ()
    return ModelConfig(_NAME, **fields, **layer_windows(kinds, window), layer_ropes=layer_ropes)


def _gguf_keys(file: GGUFMetadata) -> dict[str, Any]:
    return file.windows(4)


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    return decoder_tensors(c, {**POST_NORMS, **HEAD_NORMS})


ARCHITECTURES = (
    Architecture(_NAME, "exaone4", _read_config, _tensors, forward, "exaone4", _gguf_keys),
)
