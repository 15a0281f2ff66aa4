"""FlashInfer's index arrays, read by a small attention that takes only these arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.attention.batch import Row
from engine.attention.flashinfer_plan import PagedIndices, paged_indices, step_indices
from engine.attention.torch_backend import TorchBackend
from tests.support.backends import build_batch
from tests.unit.engine.attention.reference import CASES, HEADS, poisoned, queries


def consume(
    part: PagedIndices, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor
) -> torch.Tensor:
    """What FlashInfer's paged kernels compute with causal=True, HND pages, q [n, heads, dim]."""
    page_size, group = k_pages.shape[2], q.shape[1] // k_pages.shape[1]
    out = torch.empty_like(q)
    for r in range(len(part.kv_last_page_len)):
        first, end = part.qo_indptr[r], part.qo_indptr[r + 1]
        pages = part.kv_indices[part.kv_indptr[r] : part.kv_indptr[r + 1]].tolist()
        num_keys = (len(pages) - 1) * page_size + int(part.kv_last_page_len[r])
        k, v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :num_keys] for x in (k_pages, v_pages))
        for i in range(first, end):
            seen = num_keys - (end - 1 - i)
            for head in range(q.shape[1]):
                score = k[head // group, :seen] @ q[i, head] * q.shape[2] ** -0.5
                out[i, head] = score.softmax(0) @ v[head // group, :seen]
    return out


@pytest.mark.parametrize("shapes", CASES.values(), ids=CASES.keys())
def test_the_arrays_give_what_the_torch_backend_gives(shapes: list[tuple[int, int]]) -> None:
    rows, cache = poisoned(shapes)
    q = queries(rows, cache)
    step = step_indices(rows, cache.layout.block_size)
    parts = [part for part in (step.decode, step.prefill) if part is not None]
    outs = [consume(part, q[torch.from_numpy(part.tokens)], *cache.layer(1)) for part in parts]
    got = torch.cat(outs)[torch.from_numpy(step.order)]
    backend = TorchBackend(cache.layout, HEADS)
    plan = backend.plan(build_batch(rows, cache.layout.block_size, q.device))
    torch.testing.assert_close(got, backend.run(plan, 1, q, cache), rtol=1e-5, atol=1e-5)


def test_rows_of_one_token_go_to_the_decode_kernel() -> None:
    rows = [Row([1], 4, [7, 8], 1), Row([1, 2], 0, [3], 0), Row([5], 0, [2], 1)]
    step = step_indices(rows, 4)
    assert step.decode is not None and step.prefill is not None
    assert step.decode.qo_indptr.tolist() == [0, 1, 2]
    assert step.decode.tokens.tolist() == [0, 3]
    assert step.prefill.tokens.tolist() == [1, 2]
    assert step.order.tolist() == [0, 2, 3, 1]
    assert step_indices(rows[:1], 4).prefill is None
    assert step_indices(rows[1:2], 4).decode is None


def test_the_arrays_of_the_docstring() -> None:
    rows = [Row([0] * 4, 36, [9, 5, 6, 1], 0), Row([0] * 2, 14, [4], 0), Row([0] * 5, 0, [8], 0)]
    part = paged_indices(rows, np.array([0, 4, 6]), 16)
    assert part.qo_indptr.tolist() == [0, 4, 6, 11]
    assert part.kv_indptr.tolist() == [0, 3, 4, 5]
    assert part.kv_indices.tolist() == [9, 5, 6, 4, 8]
    assert part.kv_last_page_len.tolist() == [8, 16, 5]
    assert {a.dtype for a in (part.qo_indptr, part.kv_indptr, part.kv_indices)} == {
        np.dtype(np.int32)
    }
