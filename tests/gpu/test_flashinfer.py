"""FlashInfer's wrappers against the float64 reference; a whole model on CUDA against the CPU.

Without a GPU the package's classes run on CPU tensors and torch code stands for its kernels
(`tests/support/flashinfer_cpu.py`): arguments, layouts and plans are checked, the kernels are not.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

from engine.attention.base import AttentionBackend
from engine.attention.batch import Row
from engine.attention.torch_backend import TorchBackend
from engine.base.errors import ConfigError
from engine.cache.kv_cache import KVCache
from engine.models.config import AttentionSpec
from engine.runner.loader import random_model
from engine.runner.runner import Runner
from tests.support.backends import build_batch, select_backend
from tests.support.paged import CPU, layout_of, tiny_config
from tests.unit.engine.attention.reference import (
    CASES,
    HEADS,
    poisoned,
    queries,
    reference_attention,
)

CUDA = torch.device("cuda:0")


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """What only a GPU can show."""
    missing = find_spec("flashinfer") is None or not torch.cuda.is_available()
    skipped = pytest.mark.skipif(missing, reason="needs a CUDA device and flashinfer")
    return pytest.mark.gpu(skipped(test))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("window", [0, 6, 37])
@pytest.mark.parametrize("shapes", CASES.values(), ids=CASES.keys())
def test_kernels_equal_the_reference_over_a_poisoned_pool(
    shapes: list[tuple[int, int]], window: int, dtype: str, flashinfer_device: torch.device
) -> None:
    from engine.attention.flashinfer_backend import FlashInferBackend

    device = flashinfer_device
    rows, cache = poisoned(shapes, block_size=16, dtype=dtype, head_dim=64, device=device)
    q = queries(rows, cache)
    backend = FlashInferBackend(cache.layout, HEADS, device, AttentionSpec(window=window))
    plan = backend.plan(build_batch(rows, 16, device))
    got = backend.run(plan, 1, q, cache)
    on_cpu = KVCache(cache.layout, cache.num_blocks, CPU)
    on_cpu.pool.copy_(cache.pool)
    expected = reference_attention(rows, 1, q.cpu(), on_cpu, window)
    torch.testing.assert_close(got.double().cpu(), expected, rtol=2e-2, atol=2e-2)


def test_an_outdated_plan_is_refused(flashinfer_device: torch.device) -> None:
    from engine.attention.flashinfer_backend import FlashInferBackend

    device = flashinfer_device
    rows, cache = poisoned([(4, 1)], block_size=16, dtype="bfloat16", head_dim=64, device=device)
    backend = FlashInferBackend(cache.layout, HEADS, device)
    old = backend.plan(build_batch(rows, 16, device))
    backend.plan(build_batch(rows, 16, device))
    with pytest.raises(RuntimeError, match="void"):
        backend.run(old, 0, queries(rows, cache), cache)


@on_gpu
def test_fp32_is_left_to_the_torch_backend() -> None:
    from engine.attention.flashinfer_backend import FlashInferBackend

    layout = layout_of(tiny_config(), 16)
    with pytest.raises(ConfigError, match="no fp32 kernels"):
        FlashInferBackend(layout, 6, CUDA)
    assert isinstance(
        select_backend(KVCache(layout, 1, CUDA), tiny_config(num_heads=6)), TorchBackend
    )


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_on_cuda_answers_as_on_the_cpu(dtype: str) -> None:
    config = tiny_config(hidden_size=384, head_dim=64, num_layers=2)
    steps = [
        [Row(range(40), 0, [3, 1, 2], 40), Row(range(50, 90), 0, [7, 5, 6], 0)],
        [Row([9], 40, [3, 1, 2], 1), Row([8, 7, 6, 5], 40, [7, 5, 6], 4)],
    ]
    answers = []
    for device in (CPU, CUDA):
        model = random_model(config, 0, getattr(torch, dtype), device)
        cache = KVCache(layout_of(config, 16, dtype), 8, device)
        backend: AttentionBackend[object] = select_backend(cache, tiny_config(num_heads=6))
        runner = Runner(model, cache, backend)
        answers.append(torch.cat([runner.run(rows).cpu() for rows in steps]))
    error = (answers[0] - answers[1]).abs().amax(-1) / answers[0].abs().amax(-1)
    assert error.max() < (1e-4 if dtype == "float32" else 0.1)
