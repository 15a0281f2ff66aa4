"""Llama, Mistral and Qwen2 (SmolLM2 and many others are Llamas): one forward pass.

They differ in what their configuration files leave to a default: biases and windows.
"""

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

LLAMA, MISTRAL, QWEN2 = "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"


def _read_llama(raw: ConfigReader) -> ModelConfig:
    attention_bias, mlp_bias = (bool(raw.get(f"{x}_bias", False)) for x in ("attention", "mlp"))
    return ModelConfig(
        LLAMA,
        **decoder_fields(raw),
        attention_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=mlp_bias,
    )


def _read_mistral(raw: ConfigReader) -> ModelConfig:
    # An absent key means the architecture's default; only a null means full attention.
    window = raw.data.get("sliding_window", 4096)
    return ModelConfig(MISTRAL, **decoder_fields(raw), sliding_window=int(window or 0))


def _read_qwen2(raw: ConfigReader) -> ModelConfig:
    return ModelConfig(QWEN2, **decoder_fields(raw), attention_bias=True, **qwen_windows(raw))


def tensors(c: ModelConfig) -> Iterator[TensorSpec]:
    """The tensors of a checkpoint, layer by layer."""
    q, kv, hidden, inner = (
        c.num_heads * c.head_dim,
        c.num_kv_heads * c.head_dim,
        c.hidden_size,
        c.intermediate_size,
    )
    # llama.cpp's converter reorders q and k of Llama models only.
    heads, kv_heads = (c.num_heads, c.num_kv_heads) if c.architecture == LLAMA else (0, 0)
    weights = [
        weight("q", "qkv", "self_attn.q_proj", "attn_q", (q, hidden), 0, heads),
        weight("k", "qkv", "self_attn.k_proj", "attn_k", (kv, hidden), 0, kv_heads),
        weight("v", "qkv", "self_attn.v_proj", "attn_v", (kv, hidden), 0),
        weight("out", "out", "self_attn.o_proj", "attn_output", (hidden, q), 1),
        weight("gate", "gate_up", "mlp.gate_proj", "ffn_gate", (inner, hidden), 0),
        weight("up", "gate_up", "mlp.up_proj", "ffn_up", (inner, hidden), 0),
        weight("down", "down", "mlp.down_proj", "ffn_down", (hidden, inner), 1),
        weight("input_norm", "input_norm", "input_layernorm", "attn_norm", (hidden,), None),
        weight("mlp_norm", "mlp_norm", "post_attention_layernorm", "ffn_norm", (hidden,), None),
    ]
    has_bias = {
        "qkv": c.attention_bias,
        "out": c.output_bias,
        "gate_up": c.mlp_bias,
        "down": c.mlp_bias,
    }
    biased = frozenset(name for name, present in has_bias.items() if present)
    for layer in range(c.num_layers):
        yield from layer_tensors(layer, weights, biased)
    yield from outer_tensors(c)


def forward(step: Step, layers: Sequence[Layer]) -> Tensor:
    """Logits fp32 [S, vocab]; each layer adds attention and a gated feed-forward to x."""
    x = step.embed()
    for i, layer in enumerate(layers):
        q, k, v = step.rotated_heads(layer["qkv"](layer["input_norm"](x)))
        attention = step.attend(i, q, k, v)
        if attention is None:
            return step.no_logits()
        x = x + layer["out"](attention)
        x = x + layer["down"](step.silu_gated(layer["gate_up"](layer["mlp_norm"](x))))
    return step.logits(x)


ARCHITECTURES = (
    Architecture(LLAMA, "llama", _read_llama, tensors, forward, gguf="llama"),
    Architecture(MISTRAL, "mistral", _read_mistral, tensors, forward),
    Architecture(QWEN2, "qwen2", _read_qwen2, tensors, forward, gguf="qwen2"),
)
