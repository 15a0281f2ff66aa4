"""Packed and dense weights of the default model: one numeric profile, different order of sums."""

from __future__ import annotations

import random

import pytest
import torch

from engine.checkpoint.source import Checkpoint, resolve, weights
from engine.model.layers import MAX_PACKED_ROWS
from engine.model.llama import LlamaModel
from engine.model.loader import load_model
from engine.model.packed import add_packed
from engine.native import kernels
from tests.support.paged import CPU, Bench

pytestmark = pytest.mark.skipif(
    kernels() is None, reason="needs a C compiler and a CPU with AVX512-BF16"
)


def load(checkpoint: Checkpoint, dtype: torch.dtype) -> LlamaModel:
    paths = weights(checkpoint, str(dtype).removeprefix("torch."), progress=False)
    return load_model(checkpoint.config, paths, dtype, CPU, progress=False)


def test_logits_differ_no_more_than_two_dense_roundings_do() -> None:
    """The error against fp32 sums over the same rounded weights, packed beside dense."""
    checkpoint = resolve("smollm2", progress=False)
    dense = load(checkpoint, torch.bfloat16)
    packed = add_packed(dense, checkpoint)
    assert packed is not dense
    assert all(layer.packed is not None for layer in packed.weights.layers)
    assert packed.weights.packed_head is not None
    rng = random.Random(3)
    tokens = [rng.randrange(1000, 40000) for _ in range(120)]
    errors = []
    exact = _logits(load(checkpoint, torch.float32), tokens)
    for model in (dense, packed):
        errors.append((_logits(model, tokens) - exact).abs().mean().item())
    print(f"mean error of a logit: dense {errors[0]:.4f}, packed {errors[1]:.4f}")
    assert errors[1] < 1.5 * errors[0], "the packed values are the same; only sums differ"


def test_other_precisions_stay_dense() -> None:
    checkpoint = resolve("smollm2", progress=False)
    exact = load(checkpoint, torch.float32)
    assert add_packed(exact, checkpoint) is exact


def _logits(model: LlamaModel, tokens: list[int]) -> torch.Tensor:
    """Of every position, in steps that the packed weights take."""
    bench = Bench(model, block_size=16, num_blocks=20)
    sequence = bench.sequence(tokens)
    out = []
    for start in range(0, len(tokens), MAX_PACKED_ROWS):
        count = min(MAX_PACKED_ROWS, len(tokens) - start)
        out.append(bench.step((sequence, count, count)))
    return torch.cat(out)
