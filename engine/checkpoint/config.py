"""ModelConfig: the architecture's numbers, read from a Hugging Face `config.json`. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


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
