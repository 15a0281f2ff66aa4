"""Each argument that the backend gives to FlashInfer matters: with a wrong one, the check fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from engine.attention.batch import Row
from engine.attention.flashinfer_backend import WORKSPACE_BYTES, FlashInferBackend
from engine.base.kv_layout import KVLayout
from engine.cache.kv_cache import KVCache
from engine.models.config import AttentionSpec
from tests.support.backends import build_batch
from tests.support.flashinfer_memory import KernelError
from tests.unit.engine.attention.reference import (
    CASES,
    HEADS,
    poisoned,
    queries,
    reference_attention,
)

DEVICE = torch.device("cpu")
WINDOW = 6
GROUPS = (4, 6)  # heads over two of K and V: decode on CUDA cores, and on tensor cores
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="wrong arguments are for the CPU alone"),
    pytest.mark.usefixtures("flashinfer_device"),
]


@functools.cache
def case(num_heads: int) -> tuple[list[Row], KVCache, torch.Tensor, torch.Tensor]:
    """Rows of every kind, their cache, queries, and what attention gives."""
    rows, cache = poisoned(CASES["everything"], block_size=16, dtype="float16", head_dim=64)
    q = queries(rows, cache, num_heads)
    return rows, cache, q, reference_attention(rows, 1, q, cache, WINDOW)


def check(num_heads: int) -> None:
    """The backend against the reference."""
    rows, cache, q, expected = case(num_heads)
    backend = FlashInferBackend(cache.layout, num_heads, DEVICE, AttentionSpec(window=WINDOW))
    got = backend.run(backend.plan(build_batch(rows, 16, DEVICE)), 1, q, cache)
    torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("num_heads", [2, *GROUPS, 8, 14, 32])
def test_right_arguments_pass(num_heads: int) -> None:
    check(num_heads)


Change = Callable[[Any], Any]
# (wrapper, argument of plan or constructor by position or name, what a mistake would make of it)
MISTAKES: dict[str, tuple[str, str, int | str, Change]] = {
    "query indptr of int64": ("Prefill", "plan", 0, lambda x: x.long()),
    "page indptr of int64": ("Prefill", "plan", 1, lambda x: x.long()),
    "decode: indptr of int64": ("Decode", "plan", 0, lambda x: x.long()),
    "pages of int64": ("Decode", "plan", 1, lambda x: x.long()),
    "pages in another order": ("Decode", "plan", 1, lambda x: x.flip(0)),
    "pages of the next block": ("Prefill", "plan", 2, lambda x: x + 1),
    "a last page longer by one": ("Decode", "plan", 2, lambda x: x + 1),
    "prefill: a last page longer by one": ("Prefill", "plan", 3, lambda x: x + 1),
    "a last page of full length": ("Prefill", "plan", 3, lambda x: torch.full_like(x, 16)),
    "a last page counted from 0": ("Decode", "plan", 2, lambda x: x - 1),
    "half of the heads": ("Prefill", "plan", 4, lambda n: n // 2),
    "K/V heads": ("Prefill", "plan", 5, lambda n: 4),
    "head size": ("Decode", "plan", 5, lambda n: 128),
    "a head size without kernels": ("Decode", "plan", 5, lambda n: 96),
    "not causal": ("Prefill", "plan", "causal", lambda _: False),
    "window longer by one": ("Decode", "plan", "window_left", lambda n: n + 1),
    "no window": ("Prefill", "plan", "window_left", lambda _: -1),
    "dtype of queries": ("Prefill", "plan", "q_data_type", lambda _: torch.bfloat16),
    "dtype of keys": ("Decode", "plan", "kv_data_type", lambda _: torch.bfloat16),
    "scale": ("Decode", "plan", "sm_scale", lambda _: 1.0),
    "prefill: scale": ("Prefill", "plan", "sm_scale", lambda _: 0.1),
    "layout": ("Decode", "__init__", 1, lambda _: "NHD"),
    "prefill: layout": ("Prefill", "__init__", 1, lambda _: "NHD"),
    "queries in another order": ("Decode", "run", 0, lambda q: q.flip(0)),
    "K and V exchanged": ("Prefill", "run", 1, lambda kv: kv[::-1]),
    "V with strides of its own": ("Prefill", "run", 1, lambda kv: (kv[0], kv[1].contiguous())),
    "keys of NHD blocks": ("Decode", "run", 1, lambda kv: tuple(x.transpose(1, 2) for x in kv)),
}


@pytest.mark.parametrize("num_heads", GROUPS)
@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_argument_is_caught(name: str, num_heads: int) -> None:
    import flashinfer

    kind, method, where, change = MISTAKES[name]
    wrapper = getattr(flashinfer, f"Batch{kind}WithPagedKVCacheWrapper")
    real = getattr(wrapper, method)

    def mistaken(self: Any, *args: Any, **options: Any) -> Any:
        values = list(args)
        if isinstance(where, int):
            values[where] = change(values[where])
        else:
            options[where] = change(options.get(where))
        return real(self, *values, **options)

    with mock.patch.object(wrapper, method, mistaken), pytest.raises(Exception) as caught:
        check(num_heads)
    assert not isinstance(caught.value, (TypeError, AttributeError, IndexError)), caught.value


def test_one_plan_a_step_serves_every_layer() -> None:
    """Planning copies to the GPU and waits: it is no work of a layer."""
    import flashinfer

    rows, cache = poisoned(CASES["everything"], block_size=16, dtype="float16", head_dim=64)
    backend = FlashInferBackend(cache.layout, HEADS, DEVICE)
    planned: list[str] = []
    for kind in ("Decode", "Prefill"):
        wrapper = getattr(flashinfer, f"Batch{kind}WithPagedKVCacheWrapper")
        real = wrapper.plan

        def plan(self: Any, *args: Any, real: Any = real, **options: Any) -> Any:
            planned.append(real.__qualname__)
            return real(self, *args, **options)

        mock.patch.object(wrapper, "plan", plan).start()
    try:
        step = backend.plan(build_batch(rows, 16, DEVICE))
        for layer in range(2):
            backend.run(step, layer, queries(rows, cache), cache)
    finally:
        mock.patch.stopall()
    assert len(planned) == 2


# (query heads, K/V heads, head size) of Llama 70B, Llama 8B, Llama 2 7B and Gemma 2 9B
SHAPES = [(64, 8, 128), (32, 8, 128), (32, 32, 128), (16, 8, 256)]


def plan_large_steps(num_heads: int, num_kv_heads: int, head_dim: int, num_bytes: int) -> None:
    """Plan the largest steps of a GPU's defaults, and some that FlashInfer splits over the SMs."""
    meta, table = torch.device("meta"), range(8192)

    def rows(count: int, num_tokens: int, start: int) -> list[Row]:
        return [Row(range(num_tokens), start, table, 0)] * count

    steps = [rows(256, 1, 8000), rows(1, 1, 131_000), rows(9, 1, 131_000), rows(256, 5, 8000)]
    steps += [rows(1, 8192, 0), rows(1, 300, 130_000), rows(16, 512, 30_000)]
    layout = KVLayout(1, num_kv_heads, head_dim, 16, "bfloat16")
    with (
        mock.patch("engine.attention.flashinfer_backend.WORKSPACE_BYTES", num_bytes),
        mock.patch("tests.support.flashinfer_kernels.NUM_SM", 192),
    ):
        backend = FlashInferBackend(layout, num_heads, meta)
        for step in steps:
            backend.plan(build_batch(step, 16, meta))


@pytest.mark.parametrize("shape", SHAPES)
def test_workspaces_hold_the_largest_steps(shape: tuple[int, int, int]) -> None:
    plan_large_steps(*shape, WORKSPACE_BYTES)
    with pytest.raises(KernelError, match="workspace too small"):
        plan_large_steps(*shape, 1 << 20)
