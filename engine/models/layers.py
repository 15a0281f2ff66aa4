"""The pieces of a decoder layer: weights as plain values, and functions of them.

Activations and weights have one dtype; norms, rotary embedding, softmax and logits are computed in
fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

HEAD_CHUNK_BYTES = 2 << 20  # fp32 rows of the output head that fit in a core's cache


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer; q, k and v, and gate and up, are joined along their outputs."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden]
    qkv_bias: torch.Tensor | None
    out: torch.Tensor  # [hidden, num_heads * head_dim]
    out_bias: torch.Tensor | None
    mlp_norm: torch.Tensor  # [hidden]
    gate_up: torch.Tensor  # [2 * intermediate, hidden]
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor  # [hidden, intermediate]
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A whole decoder."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocab, hidden]; the embedding itself when tied


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, hidden] over its root mean square, times weight; in fp32, returned in x's dtype."""
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)  # one kernel, fp32 inside
    # torch's CPU code rounds before it multiplies by the weight.
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def mlp(x: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
    """Gated SiLU feed-forward of x [T, hidden]."""
    gate, up = F.linear(x, layer.gate_up, layer.gate_up_bias).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, layer.down, layer.down_bias)


def logits(x: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """x [S, hidden] times head [vocab, hidden]: fp32 [S, vocab], not rounded on the way.

    torch's bf16 product on the CPU rounds its result, which makes ties; so the head is widened
    piece by piece.
    """
    if head.dtype == torch.float32:
        return F.linear(x, head)
    if head.device.type != "cpu":
        return torch.mm(x, head.t(), out_dtype=torch.float32)
    (vocab, hidden), wide = head.shape, x.float()
    out = torch.empty(x.shape[0], vocab, dtype=torch.float32)
    step = max(HEAD_CHUNK_BYTES // (4 * hidden), 1)
    piece = torch.empty(step, hidden, dtype=torch.float32)
    for first in range(0, vocab, step):
        rows = head[first : first + step]
        torch.mm(wide, piece[: len(rows)].copy_(rows).t(), out=out[:, first : first + step])
    return out
