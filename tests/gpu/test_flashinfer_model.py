"""Whole models over the FlashInfer backend against the same over the torch backend."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from engine.attention.batch import Row
from engine.attention.torch_backend import TorchBackend
from engine.cache.kv_cache import KVCache
from engine.models.config import AttentionSpec
from engine.runner.loader import random_model
from engine.runner.runner import Runner
from engine.runner.torch_model import TorchModel
from tests.support.draft_bench import PairedWorker, random_works
from tests.support.paged import layout_of, tiny_config

SIZE = 16


def torch_backend(kv_cache: KVCache, num_heads: int, window: int) -> TorchBackend:
    return TorchBackend(
        kv_cache.layout, num_heads, AttentionSpec(window=window), kv_cache.block_stride
    )


def flashinfer_backend(kv_cache: KVCache, num_heads: int, window: int) -> Any:
    from engine.attention.flashinfer_backend import FlashInferBackend

    return FlashInferBackend(
        kv_cache.layout, num_heads, kv_cache.device, AttentionSpec(window=window)
    )


def random_steps(seed: int) -> list[list[Row]]:
    """Four requests over shuffled blocks: chunks, single tokens and drafts, in any order."""
    rng = random.Random(seed)
    blocks = list(range(64))
    rng.shuffle(blocks)
    tables = [blocks[16 * i : 16 * (i + 1)] for i in range(4)]
    tokens = [[rng.randrange(101) for _ in range(200)] for _ in tables]
    done, steps = [0] * 4, []
    for _ in range(6):
        rows = []
        for i in rng.sample(range(4), rng.randint(1, 4)):
            count = rng.choice([1, 1, 3, 5, 17, 40]) if done[i] else rng.choice([1, 16, 33])
            wanted = rng.randint(0, count)
            rows.append(Row(tokens[i][done[i] : done[i] + count], done[i], tables[i], wanted))
            done[i] += count
        steps.append(rows)
    return steps


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_logits_are_the_torch_backends(
    dtype: str, window: int, seed: int, flashinfer_device: torch.device
) -> None:
    num_heads, num_kv_heads = [(6, 2), (4, 2), (8, 1)][seed]
    config = tiny_config(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=64, sliding_window=window
    )
    model = random_model(config, seed, getattr(torch, dtype), flashinfer_device)
    out = []
    for backend_of in (torch_backend, flashinfer_backend):
        cache = KVCache(layout_of(config, SIZE, dtype), 64, flashinfer_device)
        cache.pool.fill_(float("nan"))
        runner = Runner(model, cache, backend_of(cache, num_heads, window))
        out.append(torch.cat([runner.run(rows) for rows in random_steps(seed)]).cpu())
    error = (out[0] - out[1]).abs().amax(-1) / out[0].abs().amax(-1)
    assert len(error) > 10 and error.max() < (1e-2 if dtype == "float16" else 5e-2)


def test_answers_of_an_engine_with_a_draft_model_are_the_torch_backends(
    flashinfer_device: torch.device,
) -> None:
    """Both models lie in the same blocks, and their backends plan in turns."""
    if flashinfer_device.type != "cpu":
        pytest.skip("the engine of this test lies in the CPU's memory")

    def model(num_layers: int, num_heads: int, seed: int) -> TorchModel:
        config = tiny_config(num_layers=num_layers, num_heads=num_heads, head_dim=64)
        return random_model(config, seed, torch.float16)

    target, draft = model(2, 6, 1), model(1, 4, 2)
    answers = []
    for backend_of in (torch_backend, flashinfer_backend):
        panel = PairedWorker(target, draft, size=SIZE, num_blocks=40, backend_of=backend_of)
        for work in random_works(random.Random(5), 6):
            panel.add(work)
        panel.run()
        answers.append(panel.answers)
    assert answers[0] == answers[1]
    assert sum(map(len, answers[0].values())) > 40
