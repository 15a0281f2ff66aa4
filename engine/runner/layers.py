"""The operators of a decoder in torch: they hold their weights and are called with activations.

Activations and weights have one dtype; norms, rotary embedding, softmax and logits are computed in
fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

HEAD_CHUNK_BYTES = 2 << 20  # fp32 rows of the output head that fit in a core's cache


@dataclass(frozen=True, slots=True)
class DenseProjection:
    """A projection of plain weights."""

    weight: torch.Tensor  # [outputs, inputs]
    bias: torch.Tensor | None  # [outputs]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, inputs] -> [T, outputs]."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square norm over the last axis."""

    weight: torch.Tensor  # [size]
    eps: float
    offset: float = 0.0  # the factor is weight + offset, added in fp32

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., size] normalised, in x's dtype."""
        if self.offset:
            return rms_norm(x.float(), self.weight.float() + self.offset, self.eps).to(x.dtype)
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., size] over its root mean square, times weight; in fp32, returned in x's dtype."""
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)  # one kernel, fp32 inside
    # torch's CPU code rounds before it multiplies by the weight.
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def gated(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(first half) * second half of [T, 2 * intermediate]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    return F.silu(gate) * up


def capped(x: torch.Tensor, cap: float) -> torch.Tensor:
    """cap * tanh(x / cap), and x where `cap` is 0."""
    return cap * torch.tanh(x / cap) if cap else x


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
