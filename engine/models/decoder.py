"""What the decoders here have in common: one list of tensors, and one forward pass.

    x = embedding
      + out(attention(norm(x)))      a norm before the sum where the layer has an `out_norm`
      + down(gated(norm(x)))         and a `down_norm`
    logits = head(norm(x))           of the tokens that need them

In a layer with experts, each token takes some of many feed-forwards instead of the one.

decoder.c computes the same operations in the same order. Scales, caps, windows, rotations and the
activation are values of ModelConfig; the `Step` applies them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from engine.models.architecture import Layer, Step, TensorSpec, layer_tensors, outer_tensors
from engine.models.config import ModelConfig
from engine.models.experts import EXPERT_BIASES, ExpertNames, expert_vectors, expert_weights

if TYPE_CHECKING:
    from torch import Tensor

# Norms of a layer: name -> (Hugging Face name, GGUF name).
Norms = Mapping[str, tuple[str, str]]
PRE_NORMS: Norms = {
    "input_norm": ("input_layernorm", "attn_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
}
HEAD_NORMS: Norms = {
    "q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "k_norm": ("self_attn.k_norm", "attn_k_norm"),
}


def _sinks(num_heads: int) -> TensorSpec:
    names = ("self_attn.sinks", "attn_sinks.weight")
    return TensorSpec("sinks", *names, (num_heads,), "sinks", 0)


def decoder_tensors(
    c: ModelConfig,
    norms: Norms = PRE_NORMS,
    *,
    norm_offset: float = 0.0,
    permuted_heads: bool = False,
    expert_names: ExpertNames | None = None,
) -> Iterator[TensorSpec]:
    """The tensors of a checkpoint, layer by layer.

    norm_offset: files in Hugging Face layout hold the weights of norms less this number.
    permuted_heads: GGUF files have the rows of q and k in llama.cpp's rotary order.
    expert_names: of a model with experts.
    """
    q, kv, hidden = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size
    heads, kv_heads = (c.num_heads, c.num_kv_heads) if permuted_heads else (0, 0)
    inner = c.intermediate_size
    attention = [
        TensorSpec("q", "self_attn.q_proj", "attn_q", (q, hidden), "qkv", 0, heads),
        TensorSpec("k", "self_attn.k_proj", "attn_k", (kv, hidden), "qkv", 0, kv_heads),
        TensorSpec("v", "self_attn.v_proj", "attn_v", (kv, hidden), "qkv", 0),
        TensorSpec("out", "self_attn.o_proj", "attn_output", (hidden, q), "out", 1),
    ]
    dense = [
        TensorSpec("gate", "mlp.gate_proj", "ffn_gate", (inner, hidden), "gate_up", 0),
        TensorSpec("up", "mlp.up_proj", "ffn_up", (inner, hidden), "gate_up", 0),
        TensorSpec("down", "mlp.down_proj", "ffn_down", (hidden, inner), "down", 1),
    ]
    scales = [
        TensorSpec(
            name,
            *names,
            (c.head_dim if name in HEAD_NORMS else hidden,),
            name,
            None,
            offset=norm_offset,
        )
        for name, names in norms.items()
    ]
    has_bias = {
        "qkv": c.attention_bias,
        "out": c.output_bias,
        "gate_up": c.mlp_bias,
        "down": c.mlp_bias,
    }
    biased = frozenset(name for name, present in has_bias.items() if present)
    others = [_sinks(c.num_heads)] if c.attention_sinks else []
    for layer in range(c.num_layers):
        if (experts := c.experts) and expert_names and layer in experts.layers:
            weights = expert_weights(c, experts, expert_names)
            biases = biased | (EXPERT_BIASES if experts.biased else frozenset())
            vectors = others + expert_vectors(experts, expert_names)
            yield from layer_tensors(layer, [*attention, *weights, *scales], biases, vectors)
        else:
            yield from layer_tensors(layer, [*attention, *dense, *scales], biased, others)
    yield from outer_tensors(c, norm_offset)


def forward(step: Step, layers: Sequence[Layer]) -> Tensor:
    """Logits fp32 [S, vocab]; each layer adds attention and a gated feed-forward to x."""
    x = step.embed()
    for i, layer in enumerate(layers):
        qkv = layer["qkv"](layer["input_norm"](x))
        q, k, v = step.rotated_heads(i, qkv, layer.get("q_norm"), layer.get("k_norm"))
        attention = step.attend(i, q, k, v)
        if attention is None:
            return step.no_logits()
        x = step.add(x, layer["out"](attention), layer.get("out_norm"))
        x = step.add(x, feed_forward(step, layer, layer["mlp_norm"](x)), layer.get("down_norm"))
    return step.logits(x)


def feed_forward(step: Step, layer: Layer, x: Tensor) -> Tensor:
    """The layer's feed-forward, or its experts."""
    if experts := layer.get("experts"):
        return experts(x)
    return layer["down"](step.gated(layer["gate_up"](x)))
