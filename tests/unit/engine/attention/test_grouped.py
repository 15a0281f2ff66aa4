from __future__ import annotations

import pytest
import torch

from engine.attention.grouped import GroupedBackend
from engine.attention.torch_backend import TorchBackend
from engine.models.config import AttentionSpec
from tests.support.backends import build_batch, select_backend
from tests.support.paged import tiny_config
from tests.unit.engine.attention.reference import (
    CASES,
    CPU,
    HEADS,
    poisoned,
    queries,
    reference_attention,
)

SPECS = [
    AttentionSpec(scale=0.2),
    AttentionSpec(window=6),
    AttentionSpec(softcap=0.7),
    AttentionSpec(0.3, 5, 1.5),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shapes", CASES.values(), ids=CASES.keys())
def test_each_layer_attends_as_its_group_does(
    shapes: list[tuple[int, int]], spec: AttentionSpec
) -> None:
    rows, cache = poisoned(shapes)
    q, specs = queries(rows, cache), [AttentionSpec(), spec]
    backend = GroupedBackend(specs, lambda s: TorchBackend(cache.layout, HEADS, s))
    plan = backend.plan(build_batch(rows, cache.layout.block_size, CPU))
    for layer, s in enumerate(specs):
        expected = reference_attention(rows, layer, q, cache, s.window, s.scale, s.softcap)
        got = backend.run(plan, layer, q, cache)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_equal_layers_share_one_plan() -> None:
    _, cache = poisoned([(0, 1)])
    assert isinstance(select_backend(cache, tiny_config(sliding_window=3)), TorchBackend)
    assert isinstance(select_backend(cache, tiny_config(layer_windows=(3, 3))), TorchBackend)
    backend = select_backend(cache, tiny_config(num_layers=4, layer_windows=(3, 0, 3, 0)))
    assert isinstance(backend, GroupedBackend)
    assert backend._group_of == [0, 1, 0, 1]
    assert len(backend._backends) == 2
