"""OLMo 2 and 3: norms stand after attention and feed-forward, and over all of q and of k.

OLMo 3 has a window in three layers of four; these rotate without the scaling of the others.
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
    read_rope,
)
from engine.models.decoder import HEAD_NORMS, POST_NORMS, decoder_tensors, forward
from engine.models.gguf_metadata import GGUFMetadata

OLMO2, OLMO3 = "Olmo2ForCausalLM", "Olmo3ForCausalLM"


def _fields(raw: ConfigReader, theta: float, kind: str) -> dict[str, Any]:
    """What both have; `kind` of the layers that table 0 is for."""
    raw = ConfigReader({"rms_norm_eps": 1e-5, **raw.data}, raw.path)
    bias = bool(raw.get("attention_bias", False))
    biases = {"attention_bias": bias, "output_bias": bias}
    return decoder_fields(raw, read_rope(raw, kind, theta)) | biases | {"whole_qk_norm": True}


def _read_olmo2(raw: ConfigReader) -> ModelConfig:
    return ModelConfig(OLMO2, **_fields(raw, 10000.0, ""))


def _read_olmo3(raw: ConfigReader) -> ModelConfig:
    fields = _fields(raw, 5e5, FULL)
    default = [FULL if (i + 1) % 4 == 0 else WINDOW for i in range(fields["num_layers"])]
    kinds = attention_kinds(raw, default)
    windows = layer_windows(kinds, raw.integer("sliding_window", 4096))
    local = ConfigReader({"rope_theta": fields["rope_theta"]}, raw.path)
    if WINDOW in (raw.get("rope_parameters") or {}):
        local = ConfigReader({"rope_parameters": raw.get("rope_parameters")}, raw.path)
    ropes = tuple(int(kind == WINDOW) for kind in kinds)
    other = (read_rope(local, WINDOW, 5e5),)
    return ModelConfig(OLMO3, **fields, **windows, other_ropes=other, layer_ropes=ropes)


def _gguf_keys(file: GGUFMetadata) -> dict[str, Any]:
    """OLMo 3 has the format's name of OLMo 2, and a window."""
    if not file.get("attention.sliding_window"):
        return {}
    return {"architectures": [OLMO3], "model_type": "olmo3", **file.windows(4)}


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    return decoder_tensors(c, {**POST_NORMS, **HEAD_NORMS})


ARCHITECTURES = (
    Architecture(OLMO2, "olmo2", _read_olmo2, _tensors, forward, "olmo2", _gguf_keys),
    Architecture(OLMO3, "olmo3", _read_olmo3, _tensors, forward),
)
