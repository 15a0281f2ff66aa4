"""Rotary position embedding, NeoX style (the two halves of a head rotate), with the usual scalings.

default   theta ** (-2i / head_dim)
linear    default / factor                              (position interpolation)
llama3    long waves / factor, short ones kept, a ramp between   (Llama 3.1)
yarn      the ramp by number of rotations, and cos/sin scaled    (arXiv 2309.00071)
longrope  each frequency / a factor of its own, and cos/sin scaled    (arXiv 2402.13753)
proportional   the slow frequencies are zero; those left / factor
dynamic   default: up to max_position_embeddings dynamic NTK changes nothing. Beyond it the base
          would change with the length, and no cached block survives that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.base.errors import CheckpointError
from engine.models.config import ROPE_KINDS, ModelConfig, RopeScaling, RopeSpec


@dataclass(frozen=True, slots=True)
class Rope:
    """Frequencies of one table."""

    inv_freq: torch.Tensor  # [dim / 2] fp32: the first `dim` numbers of a head turn
    scale: float  # of cos and sin

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, 1, dim / 2] fp32 for positions [T]."""
        angles = positions.to(torch.float32)[:, None, None] * self.inv_freq
        return angles.cos() * self.scale, angles.sin() * self.scale


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads x [T, heads, head_dim] by tables [T, 1, dim / 2], in fp32; x's dtype."""
    dim = 2 * cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((rotate(x[..., :dim], cos, sin), x[..., dim:]), dim=-1)
    first, second = x.chunk(2, dim=-1)  # products with fp32 tables are fp32
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def query_growth(config: ModelConfig, positions: torch.Tensor) -> torch.Tensor | None:
    """What queries at `positions` [T] are multiplied by: [T, 1, 1] fp32; None: nothing."""
    if not config.query_beta:
        return None
    periods = torch.floor(positions.to(torch.float32) / config.query_period)
    return (1.0 + config.query_beta * torch.log1p(periods))[:, None, None]


def _llama3(inv_freq: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1: waves longer than the original context / low_freq_factor are stretched."""
    if scaling.original_max_position_embeddings <= 0:
        raise CheckpointError("rope_scaling: llama3 needs original_max_position_embeddings")
    wavelen = 2 * math.pi / inv_freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # 0: long wave, stretched; 1: short wave, kept
    ramp = (scaling.original_max_position_embeddings / wavelen - low) / (high - low)
    ramp = ramp.clamp(0, 1)
    return inv_freq * ramp + inv_freq / scaling.factor * (1 - ramp)


def _yarn(inv_freq: torch.Tensor, scaling: RopeScaling, theta: float) -> torch.Tensor:
    """YaRN: dimensions that rotate often in the original context are kept, others stretched."""
    original = scaling.original_max_position_embeddings
    if original <= 0:
        raise CheckpointError("rope_scaling: yarn needs original_max_position_embeddings")
    dim = 2 * inv_freq.shape[0]

    def dim_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    low, high = max(first, 0), min(last, dim - 1)
    steps = torch.arange(dim // 2, dtype=torch.float32)
    stretched = ((steps - low) / ((high - low) or 0.001)).clamp(0, 1)
    return inv_freq / scaling.factor * stretched + inv_freq * (1 - stretched)


def _longrope_scale(scaling: RopeScaling) -> float:
    """LongRoPE: the wider the stretch, the larger cos and sin."""
    if scaling.factor <= 1.0:
        return 1.0
    original = scaling.original_max_position_embeddings
    return math.sqrt(1.0 + math.log(scaling.factor) / math.log(original))


def make_ropes(config: ModelConfig, device: torch.device) -> tuple[Rope, ...]:
    """The model's tables. Raises CheckpointError for a scaling that is not known."""
    return tuple(_make_rope(spec, spec.dim or config.head_dim, device) for spec in config.ropes)


def _make_rope(spec: RopeSpec, d: int, device: torch.device) -> Rope:
    scaling = spec.scaling
    exponent = torch.arange(0, d, 2, dtype=torch.float32) / d
    inv_freq = 1.0 / spec.theta**exponent
    scale = 1.0
    match scaling.kind:
        case "default" | "dynamic":
            pass
        case "linear":
            inv_freq = inv_freq / scaling.factor
        case "llama3":
            inv_freq = _llama3(inv_freq, scaling)
        case "yarn":
            inv_freq = _yarn(inv_freq, scaling, spec.theta)
            scale = scaling.attention_factor or 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
        case "longrope":
            inv_freq = inv_freq / torch.tensor(scaling.factors, dtype=torch.float32)
            scale = scaling.attention_factor or _longrope_scale(scaling)
        case "proportional":
            kept = torch.arange(d // 2) < int(scaling.proportion * d // 2)
            inv_freq = torch.where(kept, inv_freq / scaling.factor, 0.0)
        case kind:
            raise CheckpointError(
                f"rope_scaling: kind {kind!r} is not known; known are {', '.join(ROPE_KINDS)}"
            )
    return Rope(inv_freq.to(device), scale)
