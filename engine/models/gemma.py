"""Gemma 2 and the text models of Gemma 3.

Norms stand before and after attention and feed-forward, embeddings are scaled by sqrt(hidden), and
layers with a window alternate with layers that see everything. Gemma 2 caps scores and logits;
Gemma 3 normalises the heads of q and k, and its layers with a window rotate by a shorter wave.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from engine.models.architecture import Architecture, TensorSpec
from engine.models.config import ConfigReader, ModelConfig, RopeSpec
from engine.models.config_keys import FULL, WINDOW, attention_kinds, decoder_fields, read_rope
from engine.models.decoder import HEAD_NORMS, Norms, decoder_tensors, forward
from engine.models.gguf_metadata import GGUFMetadata

GEMMA2, GEMMA3 = "Gemma2ForCausalLM", "Gemma3ForCausalLM"
_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the models of 27B, by the name in GGUF
_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # Gemma 2's defaults
_NORMS: Norms = {
    "input_norm": ("input_layernorm", "attn_norm"),
    "out_norm": ("post_attention_layernorm", "post_attention_norm"),
    "mlp_norm": ("pre_feedforward_layernorm", "ffn_norm"),
    "down_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
}


def _fields(raw: ConfigReader, period: int, rope: RopeSpec) -> dict[str, Any]:
    """What both have. Unless the file lists the kinds, every layer of number `period` is full."""
    activation = raw.get("hidden_activation", "gelu_pytorch_tanh")
    data = {"head_dim": 256, "tie_word_embeddings": True, **raw.data, "hidden_act": activation}
    fields = decoder_fields(ConfigReader(data, raw.path), rope)
    kinds = attention_kinds(raw, [FULL if i % period == 0 else WINDOW for i in _layers(raw)])
    window = raw.integer("sliding_window", 4096)
    return fields | {
        "layer_windows": tuple(0 if kind == FULL else window for kind in kinds),
        "attention_bias": bool(raw.get("attention_bias", False)),
        "output_bias": bool(raw.get("attention_bias", False)),
        "attention_scale": raw.number("query_pre_attn_scalar", 256) ** -0.5,
        "embedding_scale": fields["hidden_size"] ** 0.5,
        "attention_softcap": _cap(raw, "attn_logit_softcapping"),
        "logit_softcap": _cap(raw, "final_logit_softcapping"),
    }


def _layers(raw: ConfigReader) -> range:
    """Layers counted from 1."""
    return range(1, raw.integer("num_hidden_layers") + 1)


def _cap(raw: ConfigReader, key: str) -> float:
    return 0.0 if raw.get(key) is None else raw.number(key)


def _read_gemma2(raw: ConfigReader) -> ModelConfig:
    raw = ConfigReader(_CAPS | dict(raw.data), raw.path)
    return ModelConfig(GEMMA2, **_fields(raw, 2, read_rope(raw)))


def _read_gemma3(raw: ConfigReader) -> ModelConfig:
    full = read_rope(raw, FULL, theta=1e6)
    local = ConfigReader({"rope_theta": raw.number("rope_local_base_freq", 1e4)}, raw.path)
    if WINDOW in (raw.get("rope_parameters") or {}):
        local = ConfigReader({"rope_parameters": raw.get("rope_parameters")}, raw.path)
    fields = _fields(raw, raw.integer("sliding_window_pattern", 6), full)
    ropes = tuple(min(window, 1) for window in fields["layer_windows"])
    others = (read_rope(local, WINDOW),)
    return ModelConfig(GEMMA3, **fields, other_ropes=others, layer_ropes=ropes)


def _gguf_keys(file: GGUFMetadata) -> dict[str, Any]:
    """What both have; the largest models scale scores by another size than that of a head."""
    width = file.integer("embedding_length") // file.integer("attention.head_count")
    is_largest = file.integer("block_count") == _LARGEST[file.architecture]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": width if is_largest else file.head_dim(),
        "attn_logit_softcapping": file.get("attn_logit_softcapping"),
        "final_logit_softcapping": file.get("final_logit_softcapping"),
    }


def _gguf_gemma2(file: GGUFMetadata) -> dict[str, Any]:
    caps = {key: file.get(key, cap) for key, cap in _CAPS.items()}
    return _gguf_keys(file) | file.windows(2, 4096) | caps


def _gguf_gemma3(file: GGUFMetadata) -> dict[str, Any]:
    local = {"rope_local_base_freq": file.number("rope.freq_base_swa", 10000.0)}
    return _gguf_keys(file) | file.windows(6) | local


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    norms = _NORMS if c.architecture == GEMMA2 else {**_NORMS, **HEAD_NORMS}
    return decoder_tensors(c, norms, norm_offset=1.0)


ARCHITECTURES = (
    Architecture(GEMMA2, "gemma2", _read_gemma2, _tensors, forward, "gemma2", _gguf_gemma2),
    Architecture(GEMMA3, "gemma3_text", _read_gemma3, _tensors, forward, "gemma3", _gguf_gemma3),
)
