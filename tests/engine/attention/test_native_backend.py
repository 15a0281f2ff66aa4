"""Our attention kernel against the float64 reference, over a poisoned pool of bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engine.attention import select_backend
from engine.attention.native_backend import MAX_QUERIES, NativeBackend, NativePlan
from engine.attention.torch_backend import TorchPlan
from engine.cache.kv_cache import KVCache
from engine.native import Kernels, kernels
from engine.runner.batch import Row, build_batch
from tests.engine.attention.reference import CASES, HEADS, poisoned, queries, reference_attention
from tests.support.paged import CPU

LIBRARY = kernels()
pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="needs a C compiler and a CPU with AVX512-BF16"
)
SHORT = {name: rows for name, rows in CASES.items() if max(n for _, n in rows) <= MAX_QUERIES}
SHORT["long contexts"] = [(2000, 1), (1023, 5), (511, 16), (0, 16)]


def library() -> Kernels:
    assert LIBRARY is not None
    return LIBRARY


def attend(rows: list[Row], cache: KVCache, q: torch.Tensor, window: int = 0) -> torch.Tensor:
    backend = NativeBackend(cache.layout, HEADS, window, library())
    plan = backend.plan(build_batch(rows, cache.layout.block_size, CPU))
    assert isinstance(plan, NativePlan)
    return backend.run(plan, 1, q, cache)


@pytest.mark.parametrize("window", [0, 1, 6, 37])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("shapes", SHORT.values(), ids=SHORT.keys())
def test_equals_the_reference_over_a_poisoned_pool(
    shapes: list[tuple[int, int]], head_dim: int, window: int
) -> None:
    rows, cache = poisoned(shapes, dtype="bfloat16", head_dim=head_dim)
    q = queries(rows, cache)
    expected = reference_attention(rows, 1, q, cache, window)
    out = attend(rows, cache, q, window)
    assert out.dtype is torch.bfloat16
    # Rounding the result to bfloat16 is all that is lost: half a unit of 8 bits.
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("block_size", [1, 16])
def test_a_row_does_not_depend_on_the_rows_beside_it(block_size: int) -> None:
    rows, cache = poisoned(SHORT["verify"], dtype="bfloat16", head_dim=64, block_size=block_size)
    q = queries(rows, cache)
    together = attend(rows, cache, q)
    at = 0
    for row in rows:
        count = len(row.token_ids)
        alone = attend([row], cache, q[at : at + count].clone())
        assert torch.equal(alone, together[at : at + count])
        at += count


def test_large_scores_do_not_overflow() -> None:
    rows, cache = poisoned([(40, 2)], dtype="bfloat16", head_dim=64)
    q = queries(rows, cache) * 200
    expected = reference_attention(rows, 1, q, cache)
    torch.testing.assert_close(attend(rows, cache, q).double(), expected, rtol=2**-7, atol=1e-3)


def test_a_step_with_a_prompt_chunk_goes_to_torch() -> None:
    rows, cache = poisoned(CASES["everything"], dtype="bfloat16", head_dim=64)
    backend = select_backend(cache.layout, HEADS, 0, CPU)
    assert isinstance(backend, NativeBackend)
    plan = backend.plan(build_batch(rows, cache.layout.block_size, CPU))
    assert isinstance(plan, TorchPlan)
    q = queries(rows, cache)
    expected = reference_attention(rows, 1, q, cache)
    out = backend.run(plan, 1, q, cache).double()
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("width", [16, 48, 576])
def test_rms_norm_equals_torch_rounded_once(width: int) -> None:
    torch.manual_seed(width)
    x = (torch.randn(7, width) * 3).bfloat16()
    weight = torch.randn(width).bfloat16()
    expected = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    out = library().rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-9)
