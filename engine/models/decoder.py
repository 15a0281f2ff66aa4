"""What the decoders here have in common: one list of tensors, and one forward pass.

    x = embedding
      + out(attention(norm(x)))      norms before (`input_norm`, `mlp_norm`), before the sum
      + down(gated(norm(x)))         (`out_norm`, `down_norm`), or both: what the layer has
    logits = head(norm(x))           of the tokens that need them

In a layer with experts, each token takes some of many feed-forwards instead of the one.

decoder.c computes the same operations in the same order. Scales, caps, windows, rotations and the
activation are values of ModelConfig; the `Step` applies them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
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
POST_NORMS: Norms = {
    "out_norm": ("post_attention_layernorm", "post_attention_norm"),
    "down_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
}
# Of q and k: by head, or over all heads together (`whole_qk_norm`).
HEAD_NORMS: Norms = {
    "q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "k_norm": ("self_attn.k_norm", "attn_k_norm"),
}


def _sinks(num_heads: int) -> TensorSpec:
    names = ("self_attn.sinks", "attn_sinks.weight")
    return TensorSpec("sinks", *names, (num_heads,), "sinks", 0, exact=True)


def _attention(c: ModelConfig, permuted: bool, paired: bool, fused: bool) -> list[TensorSpec]:
    q, kv, hidden = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size
    parts = [
        TensorSpec("q", "self_attn.q_proj", "attn_q", (q, hidden), "qkv", 0),
        TensorSpec("k", "self_attn.k_proj", "attn_k", (kv, hidden), "qkv", 0),
        TensorSpec("v", "self_attn.v_proj", "attn_v", (kv, hidden), "qkv", 0),
    ]
    turned = (c.rotary_dim or c.head_dim) if paired else 0
    for i, heads in enumerate((c.num_heads, c.num_kv_heads)):
        in_gguf = heads if permuted else 0
        parts[i] = replace(parts[i], permuted_heads=in_gguf, paired_rows=turned, num_heads=heads)
    if fused:
        names = ("qkv", "self_attn.qkv_proj", "attn_qkv")
        parts = [TensorSpec(*names, (q + 2 * kv, hidden), "qkv", 0)]
    return [*parts, TensorSpec("out", "self_attn.o_proj", "attn_output", (hidden, q), "out", 1)]


def _feed_forward(c: ModelConfig, fused: bool) -> list[TensorSpec]:
    inner, hidden = c.intermediate_size, c.hidden_size
    parts = [
        TensorSpec("gate", "mlp.gate_proj", "ffn_gate", (inner, hidden), "gate_up", 0),
        TensorSpec("up", "mlp.up_proj", "ffn_up", (inner, hidden), "gate_up", 0),
    ]
    if fused:
        names = ("gate_up", "mlp.gate_up_proj", "ffn_up")
        parts = [TensorSpec(*names, (2 * inner, hidden), "gate_up", 0)]
    return [*parts, TensorSpec("down", "mlp.down_proj", "ffn_down", (hidden, inner), "down", 1)]


def _norms(c: ModelConfig, norms: Norms, offset: float) -> list[TensorSpec]:
    sizes = dict.fromkeys(HEAD_NORMS, c.head_dim)
    if c.whole_qk_norm:
        sizes = {"q_norm": c.num_heads * c.head_dim, "k_norm": c.num_kv_heads * c.head_dim}
    return [
        TensorSpec(name, *files, (sizes.get(name, c.hidden_size),), name, None, offset=offset)
        for name, files in norms.items()
    ]


def decoder_tensors(
    c: ModelConfig,
    norms: Norms = PRE_NORMS,
    *,
    norm_offset: float = 0.0,
    permuted_heads: bool = False,
    paired_rows: bool = False,
    fused: Collection[str] = (),
    expert_names: ExpertNames | None = None,
) -> Iterator[TensorSpec]:
    """The tensors of a checkpoint, layer by layer.

    norm_offset: files in Hugging Face layout hold the weights of norms less this number.
    permuted_heads: GGUF files have the rows of q and k in llama.cpp's rotary order.
    paired_rows: in all files the numbers of a head that turn do so in neighbouring pairs.
    fused: of "qkv" and "gate_up", what the checkpoint holds as one tensor.
    expert_names: of a model with experts.
    """
    attention = _attention(c, permuted_heads, paired_rows, "qkv" in fused)
    dense = _feed_forward(c, "gate_up" in fused)
    scales = _norms(c, norms, norm_offset)
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
        qkv = layer["qkv"](_normed(layer, "input_norm", x))
        q, k, v = step.rotated_heads(i, qkv, layer.get("q_norm"), layer.get("k_norm"))
        attention = step.attend(i, q, k, v)
        if attention is None:
            return step.no_logits()
        x = step.add(x, layer["out"](attention), layer.get("out_norm"))
        inner = feed_forward(step, layer, _normed(layer, "mlp_norm", x))
        x = step.add(x, inner, layer.get("down_norm"))
    return step.logits(x)


def feed_forward(step: Step, layer: Layer, x: Tensor) -> Tensor:
    """The layer's feed-forward, or its experts."""
    if experts := layer.get("experts"):
        return experts(x)
    return layer["down"](step.gated(layer["gate_up"](x)))


def _normed(layer: Layer, name: str, x: Tensor) -> Tensor:
    """x by the layer's norm of this name, where it has one."""
    norm = layer.get(name)
    return norm(x) if norm else x
