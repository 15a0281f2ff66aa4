"""ModelConfig: the architecture's numbers, read from a Hugging Face `config.json`. No torch here.

Both spellings of rotary parameters are read: `rope_theta` + `rope_scaling`, and `rope_parameters`
(transformers 5). What this project cannot compute exactly as the checkpoint's authors did is
refused by name, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.base.errors import CheckpointError
from engine.checkpoint.added_tokens import eos_token_ids
from engine.checkpoint.jsonfile import read_json

# model_type -> architecture, for config files that leave `architectures` out
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
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
class ModelConfig:
    """A decoder of the Llama family (Llama, Mistral, Qwen2, SmolLM2)."""

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
    attention_bias: bool  # bias on q, k and v
    output_bias: bool  # bias on o
    mlp_bias: bool
    sliding_window: int  # 0: full attention
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

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

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `config.json` and `generation_config.json` of a folder in Hugging Face layout.

        Tokens that end an answer are those that any file of the folder names (added_tokens.py).
        Raises CheckpointError naming the file and the key that is missing or not supported.
        """
        path = folder / "config.json"
        raw = _Keys(read_json(path), path)
        architecture = _architecture(raw)
        num_heads = raw.integer("num_attention_heads")
        num_kv_heads = raw.integer("num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            right = f"expected a divisor of num_attention_heads, {num_heads}"
            raise raw.refuse("num_key_value_heads", num_kv_heads, right)
        hidden_size = raw.integer("hidden_size")
        _refuse_unsupported(raw)
        theta, scaling = _rope(raw)
        generation = folder / "generation_config.json"
        tokens = read_json(generation) if generation.exists() else {}
        is_llama, is_qwen2 = architecture == "LlamaForCausalLM", architecture == "Qwen2ForCausalLM"
        attention_bias = is_llama and bool(raw.get("attention_bias", False))
        return cls(
            architecture=architecture,
            num_layers=raw.integer("num_hidden_layers"),
            hidden_size=hidden_size,
            intermediate_size=raw.integer("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=raw.integer("head_dim", hidden_size // num_heads),
            vocab_size=raw.integer("vocab_size"),
            max_position_embeddings=raw.integer("max_position_embeddings"),
            rms_norm_eps=raw.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=attention_bias or is_qwen2,
            output_bias=attention_bias,
            mlp_bias=is_llama and bool(raw.get("mlp_bias", False)),
            sliding_window=_sliding_window(raw, architecture),
            bos_token_id=next(iter(_token_ids(tokens, raw, "bos_token_id")), None),
            eos_token_ids=_eos_token_ids(folder, tokens, raw),
        )


@dataclass(frozen=True, slots=True)
class _Keys:
    """Checked access to a JSON object; null counts as absent, errors name file and key."""

    data: Mapping[str, Any]
    path: Path

    def get(self, key: str, default: Any = None) -> Any:
        value = self.data.get(key)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < math.inf:
            raise CheckpointError(f"{self.path}: {key} must be a number above zero, not {value!r}")
        return float(value)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if value != int(value):
            raise CheckpointError(f"{self.path}: {key} must be a whole number, not {value!r}")
        return int(value)

    def refuse(self, key: str, value: object, right: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key} {value!r} is not supported; {right}")


def _architecture(raw: _Keys) -> str:
    names = raw.get("architectures") or [_ARCHITECTURES.get(str(raw.get("model_type")))]
    name = names[0] if isinstance(names, list) and names else names
    if name not in _ARCHITECTURES.values():
        shown = name or raw.get("model_type")
        raise raw.refuse("architecture", shown, f"known are {', '.join(_ARCHITECTURES.values())}")
    return str(name)


def _refuse_unsupported(raw: _Keys) -> None:
    """Keys that would change the forward pass in a way that is not built."""
    if raw.get("quantization_config"):
        method = raw.get("quantization_config")
        raise raw.refuse("quantization_config", method, "use unquantised weights or a .gguf file")
    if (act := raw.get("hidden_act", "silu")) != "silu":
        raise raw.refuse("hidden_act", act, "expected 'silu'")


def _rope(raw: _Keys) -> tuple[float, RopeScaling]:
    """(theta, scaling) from either spelling; older keys fill what the newer object leaves out."""
    data = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(data, dict) or any(isinstance(value, dict) for value in data.values()):
        raise raw.refuse("rope_parameters", data, "expected one flat set for all layers")
    keys = _Keys(data, raw.path)
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
        original = _Keys({**raw.data, **data}, raw.path).integer("original_max_position_embeddings")
    if kind == "yarn" and original and keys.get("factor") is None:
        # The factor that the two contexts tell.
        keys = _Keys(
            {**data, "factor": raw.integer("max_position_embeddings") / original}, raw.path
        )
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


def _attention_factor(keys: _Keys) -> float:
    """YaRN's attention factor if the file fixes it, else 0 (derived from `factor`)."""
    if keys.get("mscale") and keys.get("mscale_all_dim") and not keys.get("attention_factor"):
        m, m_all = keys.number("mscale"), keys.number("mscale_all_dim")
        log = 0.1 * math.log(max(keys.number("factor"), 1.0))
        return (m * log + 1.0) / (m_all * log + 1.0)
    return keys.number("attention_factor") if keys.get("attention_factor") else 0.0


def _sliding_window(raw: _Keys, architecture: str) -> int:
    """One window for all layers, 0 for none; a mixture of layers is refused."""
    num_layers = raw.integer("num_hidden_layers")
    if architecture == "LlamaForCausalLM":
        return 0
    if architecture == "MistralForCausalLM":
        # An absent key means the architecture's default; only a null means full attention.
        window = raw.data.get("sliding_window", 4096)
        return int(window or 0)
    if not raw.get("use_sliding_window", False):
        return 0
    window = raw.integer("sliding_window", 4096)
    kinds = raw.get("layer_types")
    if kinds is None:
        first = int(raw.get("max_window_layers", 28))
        kinds = ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]
    if all(kind == "full_attention" for kind in kinds):
        return 0
    if all(kind == "sliding_attention" for kind in kinds):
        return window
    raise raw.refuse("sliding_window", window, "a mixture of full and sliding layers is not built")


def _eos_token_ids(folder: Path, generation: Mapping[str, Any], raw: _Keys) -> tuple[int, ...]:
    """Every id that ends an answer: each file may name some, and none is complete."""
    key = "eos_token_id"
    named = (*_ids(generation.get(key), raw, key), *_ids(raw.get(key), raw, key))
    return eos_token_ids(folder, named, raw.integer("vocab_size"))


def _token_ids(generation: Mapping[str, Any], raw: _Keys, key: str) -> tuple[int, ...]:
    """Ids under `key`, an int or a list, of generation_config.json, else of config.json."""
    return _ids(generation.get(key), raw, key) or _ids(raw.get(key), raw, key)


def _ids(value: Any, raw: _Keys, key: str) -> tuple[int, ...]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= -1 for i in ids):
        raise raw.refuse(key, value, "expected a token id or a list of them")
    return tuple(i for i in ids if i >= 0)  # -1: none, as some files write it
