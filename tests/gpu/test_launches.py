"""How many kernels a step launches, and that it never waits for the GPU, counted without one.

A launch costs a few microseconds, and a decode step of a small model is little else.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from engine.attention.batch import Row
from engine.cache.kv_cache import KVCache
from engine.runner.loader import random_model
from engine.runner.runner import Runner
from tests.support.flashinfer_kernels import Launches
from tests.support.launches import LaunchCounter
from tests.support.paged import layout_of, tiny_config

META = torch.device("meta")
DECODE = [Row([1], 40 + i, [4 * i, 4 * i + 1, 4 * i + 2], 1) for i in range(4)]
CHUNK = Row(range(33), 0, [20, 21, 22], 1)
DRAFT = Row(range(4), 50, [30, 31, 32, 33], 4)
# (rows, launches a layer, copies from the host a step)
STEPS = {
    "decode": (DECODE, 21, 6),
    "chunk": ([CHUNK], 21, 7),
    "decode and a chunk": ([*DECODE, CHUNK], 22, 12),
    "drafts among decode": ([DECODE[0], DRAFT, *DECODE[1:]], 24, 13),
}
OUTSIDE_LAYERS = 10  # rotary tables 6, embedding 1, wanted tokens, norm and head 3


def count(rows: list[Row], num_layers: int, kernels: Launches) -> tuple[int, int]:
    """Launches and copies from the host of a step."""
    from engine.attention.flashinfer_backend import FlashInferBackend

    config = tiny_config(num_layers=num_layers, num_heads=6, head_dim=64, attention_bias=True)
    model = random_model(config, 0, torch.bfloat16, META)
    cache = KVCache(layout_of(config, 16, "bfloat16"), 64, META)
    backend = FlashInferBackend(cache.layout, config.num_heads, META)
    runner = Runner(model, cache, backend)
    runner.run(rows)  # FlashInfer keeps some small tensors after the first
    kernels.names.clear()
    with LaunchCounter() as counter:
        logits = runner.run(rows)
    wanted = sum(row.num_logits for row in rows)
    assert (logits.shape, logits.dtype) == ((wanted, config.vocab_size), torch.float32)
    assert logits.device == META
    return len(counter.names) + len(kernels.names), counter.copies


@pytest.mark.parametrize("name", STEPS)
def test_a_step_stays_within_its_budget(name: str, flashinfer_kernels: Launches) -> None:
    rows, a_layer, copies = STEPS[name]
    for num_layers in (1, 3):
        launched, copied = count(rows, num_layers, flashinfer_kernels)
        assert launched <= num_layers * a_layer + OUTSIDE_LAYERS
        assert copied <= copies


def _norm_by_hand(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


def test_one_more_launch_is_counted(flashinfer_kernels: Launches) -> None:
    before, _ = count(DECODE, 2, flashinfer_kernels)
    with mock.patch("engine.runner.layers.rms_norm", _norm_by_hand):
        after, _ = count(DECODE, 2, flashinfer_kernels)
    assert after == before + 3 * 5  # two casts and one back, in each norm


@pytest.mark.parametrize("wait", [torch.Tensor.item, torch.Tensor.nonzero, torch.Tensor.cpu])
def test_a_wait_for_the_gpu_is_an_error(wait: object, flashinfer_kernels: Launches) -> None:
    def waiting(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wait(x.sum() > 0)  # type: ignore[operator]
        return _norm_by_hand(x, weight, eps)

    with (
        mock.patch("engine.runner.layers.rms_norm", waiting),
        pytest.raises((RuntimeError, NotImplementedError)),
    ):
        count(DECODE, 1, flashinfer_kernels)
