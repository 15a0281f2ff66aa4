"""Frequencies equal transformers', kind by kind."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from engine.base.errors import CheckpointError
from engine.models.config import RopeScaling
from engine.runner.rope import make_ropes, rotate
from tests.support.paged import CPU, tiny_config

SCALINGS = {
    "default": RopeScaling(),
    "linear": RopeScaling(kind="linear", factor=2.5),
    "llama3": RopeScaling(
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=128,
    ),
    "yarn": RopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=128),
    "yarn, all parameters": RopeScaling(
        kind="yarn",
        factor=4.0,
        original_max_position_embeddings=128,
        beta_fast=20.0,
        beta_slow=2.0,
        attention_factor=1.3,
    ),
    "yarn, not truncated": RopeScaling(
        kind="yarn", factor=4.0, original_max_position_embeddings=128, truncate=False
    ),
    "dynamic": RopeScaling(kind="dynamic", factor=2.0),
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotation_equals_transformers(scaling: RopeScaling, theta: float) -> None:
    heads, d = 3, 64
    parameters: dict[str, object] = {"rope_type": scaling.kind, "rope_theta": theta}
    for key in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
        parameters[key] = getattr(scaling, key)
    parameters["truncate"] = scaling.truncate
    parameters["original_max_position_embeddings"] = scaling.original_max_position_embeddings or 512
    if scaling.attention_factor:
        parameters["attention_factor"] = scaling.attention_factor
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=heads * d,
            num_attention_heads=heads,
            max_position_embeddings=512,
            rope_parameters=parameters,
        )
    )
    torch.manual_seed(0)
    x = torch.randn(1, heads, 512, d)
    positions = torch.arange(512)
    cos, sin = theirs(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x, x, cos, sin)

    (rope,) = make_ropes(tiny_config(head_dim=d, rope_theta=theta, rope_scaling=scaling), CPU)
    got = rotate(x[0].transpose(0, 1), *rope.tables(positions))
    torch.testing.assert_close(got.transpose(0, 1), expected[0], rtol=1e-4, atol=1e-4)


def test_half_precision_is_rotated_in_fp32() -> None:
    (rope,) = make_ropes(tiny_config(head_dim=64), CPU)
    torch.manual_seed(0)
    x = torch.randn(5, 2, 64).bfloat16()
    tables = rope.tables(torch.tensor([0, 1, 100, 4000, 8000]))
    got = rotate(x, *tables)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rotate(x.float(), *tables).bfloat16())


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (RopeScaling(kind="spiral"), "'spiral' is not known"),
        (RopeScaling(kind="llama3", factor=8.0), "llama3 needs original_max_position_embeddings"),
        (RopeScaling(kind="yarn", factor=8.0), "yarn needs original_max_position_embeddings"),
    ],
)
def test_a_scaling_that_cannot_be_computed_is_refused(scaling: RopeScaling, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        make_ropes(tiny_config(rope_scaling=scaling), CPU)
