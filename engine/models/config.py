"""ModelConfig: what describes any decoder here, and checked access to a config.json. No torch.

Each architecture's file fills a ModelConfig from the keys that its checkpoints use. Both spellings
of rotary parameters are read: `rope_theta` + `rope_scaling`, and `rope_parameters` (transformers
5). A key that would change the forward pass in a way that is not built is refused with its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.base.errors import CheckpointError

_ROPE_KINDS = ("default", "linear", "llama3", "yarn", "dynamic")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rotary scaling; fields that a kind does not use keep their default."""

    kind: str = "default"  # default, linear, llama3, yarn, dynamic
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0  # 0: derived
    truncate: bool = True  # yarn: the ramp begins and ends at whole dimensions


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How the layers of a group attend."""

    scale: float = 0.0  # of the scores; 0: head_dim ** -0.5
    window: int = 0  # positions that a query sees, itself included; 0: all
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap); 0: none


FULL_ATTENTION = AttentionSpec()


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder with rotary positions. A new field goes into engine/checkpoint/fingerprint.py."""

    architecture: str  # "LlamaForCausalLM", ...
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    tie_word_embeddings: bool
    attention_bias: bool = False  # bias on q, k and v
    output_bias: bool = False  # bias on o
    mlp_bias: bool = False
    sliding_window: int = 0  # of all layers; 0: full attention
    layer_windows: tuple[int, ...] = ()  # one a layer where they differ; (): `sliding_window`
    attention_scale: float = 0.0  # 0: head_dim ** -0.5
    attention_softcap: float = 0.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def context(self) -> int:
        """The longest text that the model reads, as its files describe it.

        YaRN and linear scaling stretch the original context by their factor, and
        `max_position_embeddings` is that original one unless the scaling names another. Llama 3's
        already counts the stretched one. Dynamic scaling ends at `max_position_embeddings`: beyond
        it the rotation of all positions would change with the length.
        """
        scaling, limit = self.rope_scaling, self.max_position_embeddings
        if scaling.kind not in ("yarn", "linear"):
            return limit
        return int((scaling.original_max_position_embeddings or limit) * scaling.factor)

    @property
    def attention(self) -> tuple[AttentionSpec, ...]:
        """One spec a layer; layers with equal ones form a group that shares an attention plan."""
        windows = self.layer_windows or (self.sliding_window,) * self.num_layers
        specs = (
            AttentionSpec(self.attention_scale, window, self.attention_softcap)
            for window in windows
        )
        return tuple(specs)[: self.num_layers]


@dataclass(frozen=True, slots=True)
class ConfigReader:
    """Checked access to a JSON object; null counts as absent, errors name file and key."""

    data: Mapping[str, Any]
    path: Path

    def get(self, key: str, default: Any = None) -> Any:
        """The value under `key`, unchecked."""
        value = self.data.get(key)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero. Raises CheckpointError."""
        value = self.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise CheckpointError(f"{self.path}: {key} must be a number above zero, not {value!r}")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number above zero. Raises CheckpointError."""
        value = self.number(key, default)
        if value != int(value):
            raise CheckpointError(f"{self.path}: {key} must be a whole number, not {value!r}")
        return int(value)

    def refuse(self, key: str, value: object, right: str) -> CheckpointError:
        """The error for a value that is not supported; `right` names what would be."""
        return CheckpointError(f"{self.path}: {key} {value!r} is not supported; {right}")


def decoder_fields(raw: ConfigReader) -> dict[str, Any]:
    """Fields of ModelConfig that all decoders spell alike. Raises CheckpointError.

    Left to the architecture: `architecture`, biases and windows.
    """
    num_heads, hidden_size = raw.integer("num_attention_heads"), raw.integer("hidden_size")
    num_kv_heads = raw.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        right = f"expected a divisor of num_attention_heads, {num_heads}"
        raise raw.refuse("num_key_value_heads", num_kv_heads, right)
    if (act := raw.get("hidden_act", "silu")) != "silu":
        raise raw.refuse("hidden_act", act, "expected 'silu'")
    theta, scaling = _rope(raw)
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
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": bool(raw.get("tie_word_embeddings", False)),
    }


def qwen_windows(raw: ConfigReader) -> dict[str, Any]:
    """Fields of ModelConfig for the windows of Qwen models: the later layers may have one."""
    if not raw.get("use_sliding_window", False):
        return {}
    num_layers, window = raw.integer("num_hidden_layers"), raw.integer("sliding_window", 4096)
    kinds = raw.get("layer_types")
    if kinds is None:
        first = int(raw.get("max_window_layers", 28))
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    known = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(kinds, list) or len(kinds) != num_layers or not known.keys() >= set(kinds):
        right = f"expected {num_layers} times {' or '.join(known)}"
        raise raw.refuse("layer_types", kinds, right)
    windows = tuple(known[kind] for kind in kinds)
    if len(set(windows)) == 1:
        return {"sliding_window": windows[0]}
    return {"layer_windows": windows}


def _rope(raw: ConfigReader) -> tuple[float, RopeScaling]:
    """(theta, scaling) from either spelling; older keys fill what the newer object leaves out."""
    data = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(data, dict) or any(isinstance(value, dict) for value in data.values()):
        raise raw.refuse("rope_parameters", data, "expected one flat set for all layers")
    keys = ConfigReader(data, raw.path)
    theta = keys.number("rope_theta", raw.number("rope_theta", 10000.0))
    partial = keys.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise raw.refuse("partial_rotary_factor", partial, "expected 1.0")
    kind = keys.get("rope_type", keys.get("type", "default"))
    if kind not in _ROPE_KINDS:
        raise raw.refuse("rope type", kind, f"known are {', '.join(_ROPE_KINDS)}")
    if kind == "default":
        return theta, RopeScaling()
    original = keys.get("original_max_position_embeddings")
    original = original or raw.get("original_max_position_embeddings")
    if original is not None:
        both = ConfigReader({**raw.data, **data}, raw.path)
        original = both.integer("original_max_position_embeddings")
    if kind == "yarn" and original and keys.get("factor") is None:
        factor = raw.integer("max_position_embeddings") / original
        keys = ConfigReader({**data, "factor": factor}, raw.path)
    if kind in ("yarn", "dynamic"):
        original = original or raw.integer("max_position_embeddings")
    elif kind == "llama3" and not original:
        raise CheckpointError(f"{raw.path}: original_max_position_embeddings is missing")
    return theta, RopeScaling(
        kind=kind,
        factor=keys.number("factor"),
        low_freq_factor=keys.number("low_freq_factor", 1.0),
        high_freq_factor=keys.number("high_freq_factor", 4.0),
        original_max_position_embeddings=int(original or 0),
        beta_fast=keys.number("beta_fast", 32.0),
        beta_slow=keys.number("beta_slow", 1.0),
        attention_factor=_attention_factor(keys) if kind == "yarn" else 0.0,
        truncate=bool(keys.get("truncate", True)) if kind == "yarn" else True,
    )


def _attention_factor(keys: ConfigReader) -> float:
    """YaRN's attention factor if the file fixes it, else 0 (derived from `factor`)."""
    if keys.get("mscale") and keys.get("mscale_all_dim") and not keys.get("attention_factor"):
        m, m_all = keys.number("mscale"), keys.number("mscale_all_dim")
        log = 0.1 * math.log(max(keys.number("factor"), 1.0))
        return (m * log + 1.0) / (m_all * log + 1.0)
    return keys.number("attention_factor") if keys.get("attention_factor") else 0.0
