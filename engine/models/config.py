"""ModelConfig: what describes any decoder here, and checked access to a config.json. No torch.

Each architecture's file fills a ModelConfig from the keys that its checkpoints use (config_keys.py
has the common ones). A key that would change the forward pass in a way that is not built is refused
with its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.base.errors import CheckpointError

ROPE_KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "longrope", "proportional")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Rotary scaling; fields that a kind does not use keep their default."""

    kind: str = "default"  # one of ROPE_KINDS
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0  # 0: derived
    truncate: bool = True  # yarn: the ramp begins and ends at whole dimensions
    factors: tuple[float, ...] = ()  # longrope: divisors of the frequencies, [dim / 2]
    short_factors: tuple[float, ...] = ()  # the same for texts within the original context
    proportion: float = 1.0  # proportional: so many of the frequencies are not zero


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
    whole_qk_norm: bool = False  # norms of q and k are over all heads together, not by head
    # Queries grow with their position: times 1 + beta * log(1 + floor(position / period)).
    query_beta: float = 0.0  # 0: they do not
    query_period: int = 0
    wrapper: str = ""  # the architecture of a checkpoint that holds more than a text model
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

    def for_length(self, max_model_len: int) -> ModelConfig:
        """The configuration for texts of up to `max_model_len` tokens; 0: of the whole context.

        LongRoPE has factors for texts within the original context, and others for longer ones. The
        choice is by the longest text that is served, not by each text: so a cached block is
        rotated alike whatever text it is a part of.
        """
        scaling, length = self.rope_scaling, max_model_len or self.context
        if scaling.kind != "longrope" or length > scaling.original_max_position_embeddings:
            return self
        return replace(self, rope_scaling=replace(scaling, factors=scaling.short_factors))

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
