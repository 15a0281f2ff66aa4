"""Qwen3, dense: each head of q and k is normalised before it is rotated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from engine.models.architecture import (
    Architecture,
    Layer,
    Step,
    TensorSpec,
    layer_tensors,
    outer_tensors,
    weight,
)
from engine.models.config import ConfigReader, ModelConfig, decoder_fields, qwen_windows

if TYPE_CHECKING:
    from torch import Tensor

_NAME, _HEAD_DIM = "Qwen3ForCausalLM", 128


def _read_config(raw: ConfigReader) -> ModelConfig:
    bias = bool(raw.get("attention_bias", False))
    fields = decoder_fields(raw) | {"head_dim": raw.integer("head_dim", _HEAD_DIM)}
    windows = qwen_windows(raw)
    return ModelConfig(_NAME, **fields, attention_bias=bias, output_bias=bias, **windows)


def _tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    q, kv, head = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, (c.head_dim,)
    hidden, inner = c.hidden_size, c.intermediate_size
    weights = [
        weight("q", "qkv", "self_attn.q_proj", "attn_q", (q, hidden), 0),
        weight("k", "qkv", "self_attn.k_proj", "attn_k", (kv, hidden), 0),
        weight("v", "qkv", "self_attn.v_proj", "attn_v", (kv, hidden), 0),
        weight("out", "out", "self_attn.o_proj", "attn_output", (hidden, q), 1),
        weight("gate", "gate_up", "mlp.gate_proj", "ffn_gate", (inner, hidden), 0),
        weight("up", "gate_up", "mlp.up_proj", "ffn_up", (inner, hidden), 0),
        weight("down", "down", "mlp.down_proj", "ffn_down", (hidden, inner), 1),
        weight("input_norm", "input_norm", "input_layernorm", "attn_norm", (hidden,), None),
        weight("q_norm", "q_norm", "self_attn.q_norm", "attn_q_norm", head, None),
        weight("k_norm", "k_norm", "self_attn.k_norm", "attn_k_norm", head, None),
        weight("mlp_norm", "mlp_norm", "post_attention_layernorm", "ffn_norm", (hidden,), None),
    ]
    biased = frozenset(("qkv", "out") if c.attention_bias else ())
    for layer in range(c.num_layers):
        yield from layer_tensors(layer, weights, biased)
    yield from outer_tensors(c)


def _forward(step: Step, layers: Sequence[Layer]) -> Tensor:
    x = step.embed()
    for i, layer in enumerate(layers):
        qkv = layer["qkv"](layer["input_norm"](x))
        q, k, v = step.rotated_heads(qkv, layer["q_norm"], layer["k_norm"])
        attention = step.attend(i, q, k, v)
        if attention is None:
            return step.no_logits()
        x = x + layer["out"](attention)
        x = x + layer["down"](step.silu_gated(layer["gate_up"](layer["mlp_norm"](x))))
    return step.logits(x)


ARCHITECTURES = (Architecture(_NAME, "qwen3", _read_config, _tensors, _forward, gguf="qwen3"),)
