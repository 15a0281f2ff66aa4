"""A real model in one process: greedy tokens and perplexities, computed by the runners alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from engine.checkpoint.packed import packed_file, read_packed
from engine.checkpoint.source import Checkpoint, weights
from engine.kernels import kernels
from engine.kernels.decoder import why_not_decoder
from engine.runner.loader import load_model
from engine.runner.native_model import NativeModel
from engine.runner.torch_model import TorchModel
from tests.support.paged import CPU, Bench

_CHUNK = 256
Model = TorchModel | NativeModel


def exact(checkpoint: Checkpoint) -> TorchModel:
    """The model in fp32, on dequantised weights."""
    return load_model(checkpoint.config, weights(checkpoint, "float32"), torch.float32, CPU)


def packed(checkpoint: Checkpoint) -> NativeModel:
    """The model on its packed weights, as a CPU serves it."""
    library = kernels()
    assert library, "needs our CPU kernels"
    assert not why_not_decoder(checkpoint.config)
    data = read_packed(packed_file(checkpoint, "auto"), checkpoint.config)
    return NativeModel(checkpoint.config, data, library)


def greedy(model: Model, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The best tokens, one after another, whatever ends an output."""
    bench = Bench(model, block_size=16, num_blocks=(len(prompt) + num_tokens) // 16 + 8)
    sequence = bench.sequence(prompt, room=num_tokens)
    while len(sequence.token_ids) < len(prompt) + num_tokens:
        left = len(sequence.token_ids) - sequence.num_cached
        if left > _CHUNK:
            bench.step((sequence, _CHUNK, 0))
        else:
            logits = bench.step((sequence, left, 1))
            sequence.token_ids.append(int(logits[0].argmax()))
    return sequence.token_ids[len(prompt) :]


def perplexity(model: Model, token_ids: Sequence[int]) -> float:
    """Of all tokens but the first."""
    bench = Bench(model, block_size=16, num_blocks=len(token_ids) // 16 + 8)
    sequence = bench.sequence(token_ids)
    total = 0.0
    while sequence.num_cached < len(token_ids):
        first = sequence.num_cached
        count = min(_CHUNK, len(token_ids) - first)
        logits = bench.step((sequence, count, count))
        targets = token_ids[first + 1 : first + count + 1]
        scores = logits[: len(targets)].float().log_softmax(-1)
        total -= float(scores.gather(1, torch.tensor(targets)[:, None]).double().sum())
    return math.exp(total / (len(token_ids) - 1))
