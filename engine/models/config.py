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

_KINDS = ("full_attention", "sliding_attention")
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
class RopeSpec:
    """One rotary table."""

    theta: float
    scaling: RopeScaling = RopeScaling()
    dim: int = 0  # the first numbers of a head, which turn; 0: all


NO_ROPE = -1  # in `layer_ropes`
ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}  # by `hidden_act`


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """How the layers of a group attend."""

    scale: float = 0.0  # of the scores; 0: head_dim ** -0.5
    window: int = 0  # positions that a query sees, itself included; 0: all
    softcap: float = 0.0  # scores become softcap * tanh(score / softcap); 0: none


FULL_ATTENTION = AttentionSpec()


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """The experts of a layer: which of them a token takes, and how their outputs are weighted.

    A field that changes numbers goes into engine/checkpoint/fingerprint.py.
    """

    number: int
    per_token: int  # experts that a token takes; of equal scores the lowest ids
    width: int  # intermediate size of an expert
    layers: tuple[int, ...]  # that have experts; all others have a plain feed-forward
    scoring: str = "softmax"  # of the router's outputs: softmax, sigmoid
    normalise: bool = False  # the weights of the taken experts are divided by their sum
    scale: float = 1.0  # of the weights
    corrected: bool = False  # a number for each expert is added to its score, in the choice alone
    groups: int = 1  # of neighbouring experts: the choice is within the best `chosen_groups`
    chosen_groups: int = 1
    biased: bool = False  # biases of the router and of the experts
    shared_width: int = 0  # intermediate size of what every token takes; 0: nothing
    shared_gated: bool = False  # the shared part is weighted by the sigmoid of a product
    limit: float = 0.0  # gate and up are clamped, and (up + 1) * gate * sigmoid(alpha * gate)
    alpha: float = 1.0


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
    rope_theta: float  # of table 0, which all layers use unless `layer_ropes` has others
    rope_scaling: RopeScaling
    tie_word_embeddings: bool
    attention_bias: bool = False  # bias on q, k and v
    output_bias: bool = False  # bias on o
    mlp_bias: bool = False
    sliding_window: int = 0  # of all layers; 0: full attention
    layer_windows: tuple[int, ...] = ()  # one a layer where they differ; (): `sliding_window`
    attention_scale: float = 0.0  # 0: head_dim ** -0.5
    attention_softcap: float = 0.0
    activation: str = "silu"  # silu, gelu_tanh
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and feed-forward add
    logit_scale: float = 1.0
    logit_softcap: float = 0.0  # logits become softcap * tanh(logit / softcap); 0: none
    rotary_dim: int = 0  # of table 0; 0: head_dim
    other_ropes: tuple[RopeSpec, ...] = ()  # tables 1, 2, ...
    layer_ropes: tuple[int, ...] = ()  # one a layer, or NO_ROPE; (): all use table 0
    experts: ExpertSpec | None = None
    attention_sinks: bool = False  # each head has one more score, of no position
    head_norms: bool = False  # q and k are normalised by head, where checkpoints may differ in it
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
    def ropes(self) -> tuple[RopeSpec, ...]:
        """The rotary tables."""
        first = RopeSpec(self.rope_theta, self.rope_scaling, self.rotary_dim)
        return (first, *self.other_ropes)

    def rope_of(self, layer: int) -> int:
        """The number of a layer's rotary table, or NO_ROPE."""
        return self.layer_ropes[layer] if self.layer_ropes else 0

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


def read_rope(raw: ConfigReader, kind_of_layer: str = "", theta: float = 10000.0) -> RopeSpec:
    """A rotary table from either spelling; older keys fill what the newer object leaves out.

    Args:
        raw: the configuration.
        kind_of_layer: whose parameters, where the file has a set for each kind.
        theta: the default.
    """
    data = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if isinstance(data, dict) and isinstance(data.get(kind_of_layer), dict):
        data = data[kind_of_layer]
    if not isinstance(data, dict) or any(isinstance(value, dict) for value in data.values()):
        raise raw.refuse("rope_parameters", data, "expected one flat set for all layers")
    keys = ConfigReader(data, raw.path)
    theta = keys.number("rope_theta", raw.number("rope_theta", theta))
    partial = keys.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise raw.refuse("partial_rotary_factor", partial, "expected 1.0")
    kind = keys.get("rope_type", keys.get("type", "default"))
    if kind not in _ROPE_KINDS:
        raise raw.refuse("rope type", kind, f"known are {', '.join(_ROPE_KINDS)}")
    if kind == "default":
        return RopeSpec(theta)
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
    scaling = RopeScaling(
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
    return RopeSpec(theta, scaling)


def _attention_factor(keys: ConfigReader) -> float:
    """YaRN's attention factor if the file fixes it, else 0 (derived from `factor`)."""
    if keys.get("mscale") and keys.get("mscale_all_dim") and not keys.get("attention_factor"):
        m, m_all = keys.number("mscale"), keys.number("mscale_all_dim")
        log = 0.1 * math.log(max(keys.number("factor"), 1.0))
        return (m * log + 1.0) / (m_all * log + 1.0)
    return keys.number("attention_factor") if keys.get("attention_factor") else 0.0
