"""The pieces of a decoder layer: weights as plain values, and functions of them.

Activations and weights have one dtype; norms, rotary embedding, softmax and logits are computed in
fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from engine.native import kernels

# Up to here a packed weight is faster: it moves a quarter of the bytes and unpacks once a tile.
MAX_PACKED_ROWS = 8
HEAD_CHUNK_BYTES = 2 << 20  # fp32 rows of the output head that fit in a core's cache


class PackedMatrix(Protocol):
    """A weight [N, K] in a packing of its own, for products of few rows."""

    def product(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x [M, K] times the weight transposed: [M, N] of `dtype`, summed in fp32."""
        ...


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """The packed matrices of one layer; none of them has a bias."""

    qkv: PackedMatrix
    out: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix


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
    packed: PackedLayer | None = None  # the same values for steps of few rows


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A whole decoder."""

    embedding: torch.Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden]
    head: torch.Tensor  # [vocab, hidden]; the embedding itself when tied
    packed_head: PackedMatrix | None = None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, hidden] over its root mean square, times weight; in fp32, returned in x's dtype."""
    native = x.dtype is torch.bfloat16 and x.device.type == "cpu" and x.shape[1] % 16 == 0
    if native and (library := kernels()) is not None:
        return library.rms_norm(x, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def project(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, packed: PackedMatrix | None
) -> torch.Tensor:
    """x [T, K] times weight [N, K] transposed, in the packing that suits T."""
    if packed is not None and x.shape[0] <= MAX_PACKED_ROWS:
        return packed.product(x, x.dtype)
    return F.linear(x, weight, bias)


def mlp(x: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
    """Gated SiLU feed-forward of x [T, hidden]."""
    packed = layer.packed
    joined = project(x, layer.gate_up, layer.gate_up_bias, packed.gate_up if packed else None)
    gate, up = joined.chunk(2, dim=-1)
    return project(F.silu(gate) * up, layer.down, layer.down_bias, packed.down if packed else None)


def logits(x: torch.Tensor, head: torch.Tensor, packed: PackedMatrix | None = None) -> torch.Tensor:
    """x [S, hidden] times head [vocab, hidden]: fp32 [S, vocab], not rounded on the way.

    torch's bf16 product on the CPU rounds its result, which makes ties; so the head is widened
    piece by piece.
    """
    if packed is not None and x.shape[0] <= MAX_PACKED_ROWS:
        return packed.product(x, torch.float32)
    if head.dtype == torch.float32:
        return F.linear(x, head)
    if head.device.type == "cuda":
        return torch.mm(x, head.t(), out_dtype=torch.float32)
    (vocab, hidden), wide = head.shape, x.float()
    out = torch.empty(x.shape[0], vocab, dtype=torch.float32)
    step = max(HEAD_CHUNK_BYTES // (4 * hidden), 1)
    piece = torch.empty(step, hidden, dtype=torch.float32)
    for first in range(0, vocab, step):
        rows = head[first : first + step]
        torch.mm(wide, piece[: len(rows)].copy_(rows).t(), out=out[:, first : first + step])
    return out
