"""The keys of config.json that decoders spell alike. No torch.

Both spellings of rotary parameters are read: `rope_theta` + `rope_scaling`, and `rope_parameters`
(transformers 5).
"""

from __future__ import annotations

import math
from typing import Any

from engine.base.errors import CheckpointError
from engine.models.config import ACTIVATIONS, ROPE_KINDS, ConfigReader, RopeScaling, RopeSpec

FULL, WINDOW = _KINDS = ("full_attention", "sliding_attention")


def decoder_fields(raw: ConfigReader, rope: RopeSpec | None = None) -> dict[str, Any]:
    """Fields of ModelConfig that all decoders spell alike. Raises CheckpointError.

    Left to the architecture: `architecture`, biases, windows and what else has a default; `rope`
    where it reads that itself.
    """
    num_heads, hidden_size = raw.integer("num_attention_heads"), raw.integer("hidden_size")
    num_kv_heads = raw.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        right = f"expected a divisor of num_attention_heads, {num_heads}"
        raise raw.refuse("num_key_value_heads", num_kv_heads, right)
    if (act := raw.get("hidden_act", "silu")) not in ACTIVATIONS:
        raise raw.refuse("hidden_act", act, f"known are {', '.join(ACTIVATIONS)}")
    rope = rope or read_rope(raw)
    return {
        "num_layers": raw.integer("num_hidden_layers"),
        "hidden_size": hidden_size,
        "intermediate_size": raw.integer("intermediate_size"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": raw.integer("head_dim", hidden_size // num_heads),
        "vocab_size": raw.integer("vocab_size"),
        "max_position_embeddings": raw.integer("max_position_embeddings"),
        "rms_norm_eps": raw.number("rms_norm_eps", 1e-6),
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "rotary_dim": rope.dim,
        "activation": ACTIVATIONS[act],
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
    }


def qwen_windows(raw: ConfigReader) -> dict[str, Any]:
    """Fields of ModelConfig for the windows of Qwen models: the later layers may have one."""
    if not raw.get("use_sliding_window", False):
        return {}
    num_layers, window = raw.integer("num_hidden_layers"), raw.integer("sliding_window", 4096)
    first = int(raw.get("max_window_layers", 28))
    kinds = attention_kinds(raw, [_KINDS[i >= first] for i in range(num_layers)])
    return layer_windows(kinds, window)


def layer_windows(kinds: list[str], window: int) -> dict[str, Any]:
    """Fields of ModelConfig for a window of those layers whose kind has one."""
    windows = tuple(window * _KINDS.index(kind) for kind in kinds)
    if len(set(windows)) == 1:
        return {"sliding_window": windows[0]}
    return {"layer_windows": windows}


def attention_kinds(raw: ConfigReader, default: list[str]) -> list[str]:
    """`layer_types`: full_attention or sliding_attention, one a layer. Raises CheckpointError."""
    kinds = raw.get("layer_types", default)
    if not isinstance(kinds, list) or len(kinds) != len(default) or not {*_KINDS} >= {*kinds}:
        right = f"expected {len(default)} times {' or '.join(_KINDS)}"
        raise raw.refuse("layer_types", kinds, right)
    return kinds


def read_rope(
    raw: ConfigReader, kind_of_layer: str = "", theta: float = 10000.0, partial: float = 0.0
) -> RopeSpec:
    """A rotary table from either spelling; older keys fill what the newer object leaves out.

    Args:
        raw: the configuration.
        kind_of_layer: whose parameters, where the file has a set for each kind.
        theta: the default.
        partial: the default of `partial_rotary_factor`; 0: the architecture has no such key.
    """
    data = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if isinstance(data, dict) and isinstance(data.get(kind_of_layer), dict):
        data = data[kind_of_layer]
    if not isinstance(data, dict) or any(isinstance(value, dict) for value in data.values()):
        raise raw.refuse("rope_parameters", data, "expected one flat set for all layers")
    keys = ConfigReader(data, raw.path)
    theta = keys.number("rope_theta", raw.number("rope_theta", theta))
    kind = keys.get("rope_type", keys.get("type", "default"))
    kind = "longrope" if kind == "su" else kind
    part = keys.get("partial_rotary_factor", raw.get("partial_rotary_factor", partial or 1.0))
    if part != 1.0 and not partial and kind != "proportional":
        raise raw.refuse("partial_rotary_factor", part, "expected 1.0")
    if kind not in ROPE_KINDS:
        raise raw.refuse("rope type", kind, f"known are {', '.join(ROPE_KINDS)}")
    if kind == "proportional":
        proportion = ConfigReader({"partial_rotary_factor": part}, raw.path)
        share, factor = proportion.number("partial_rotary_factor"), keys.number("factor", 1.0)
        return RopeSpec(theta, RopeScaling(kind, factor, proportion=share))
    dim = 0 if part == 1.0 else int(_head_dim(raw) * part)
    if kind == "default":
        return RopeSpec(theta, dim=dim)
    return RopeSpec(theta, _scaling(raw, keys, kind, (dim or _head_dim(raw)) // 2), dim)


def _head_dim(raw: ConfigReader) -> int:
    whole = raw.integer("hidden_size") // raw.integer("num_attention_heads")
    return raw.integer("head_dim", whole)


def _scaling(raw: ConfigReader, keys: ConfigReader, kind: str, num_factors: int) -> RopeScaling:
    """The scaling of a kind; `num_factors` is the number of frequencies."""
    original = keys.get("original_max_position_embeddings")
    original = original or raw.get("original_max_position_embeddings")
    if original is not None:
        both = ConfigReader({**raw.data, **keys.data}, raw.path)
        original = both.integer("original_max_position_embeddings")
    if kind in ("yarn", "longrope") and original and keys.get("factor") is None:
        factor = raw.integer("max_position_embeddings") / original
        keys = ConfigReader({**keys.data, "factor": factor}, raw.path)
    if kind in ("yarn", "dynamic"):
        original = original or raw.integer("max_position_embeddings")
    elif kind in ("llama3", "longrope") and not original:
        raise CheckpointError(f"{raw.path}: original_max_position_embeddings is missing")
    long_factors, short_factors = (
        _factors(keys, f"{length}_factor", num_factors) if kind == "longrope" else ()
        for length in ("long", "short")
    )
    return RopeScaling(
        kind=kind,
        factor=keys.number("factor"),
        low_freq_factor=keys.number("low_freq_factor", 1.0),
        high_freq_factor=keys.number("high_freq_factor", 4.0),
        original_max_position_embeddings=int(original or 0),
        beta_fast=keys.number("beta_fast", 32.0),
        beta_slow=keys.number("beta_slow", 1.0),
        attention_factor=_attention_factor(keys) if kind in ("yarn", "longrope") else 0.0,
        truncate=bool(keys.get("truncate", True)) if kind == "yarn" else True,
        factors=long_factors,
        short_factors=short_factors,
    )


def _factors(keys: ConfigReader, key: str, length: int) -> tuple[float, ...]:
    """LongRoPE's divisors: numbers above zero, one a frequency."""
    values = keys.get(key)
    if not isinstance(values, list) or len(values) != length:
        raise keys.refuse(key, values, f"expected {length} numbers")
    return tuple(ConfigReader({key: value}, keys.path).number(key) for value in values)


def _attention_factor(keys: ConfigReader) -> float:
    """The attention factor if the file fixes it, else 0 (derived from `factor`)."""
    if keys.get("mscale") and keys.get("mscale_all_dim") and not keys.get("attention_factor"):
        m, m_all = keys.number("mscale"), keys.number("mscale_all_dim")
        log = 0.1 * math.log(max(keys.number("factor"), 1.0))
        return (m * log + 1.0) / (m_all * log + 1.0)
    return keys.number("attention_factor") if keys.get("attention_factor") else 0.0
