"""The packed kernels hold exactly the dense bfloat16 values, and sum them as well as fp32 can."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from engine.model.packed import GGUFMatrix, q4_1, q8_0
from engine.native import Kernels, kernels

LIBRARY = kernels()
pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="needs a C compiler and a CPU with AVX512-BF16"
)
KINDS = {
    "q4_1": (q4_1, gguf.GGMLQuantizationType.Q4_1, 20),
    "q8_0": (q8_0, gguf.GGMLQuantizationType.Q8_0, 34),
}
SHAPES = {"q4_1": [(1, 64), (37, 192), (128, 576)], "q8_0": [(1, 32), (37, 96), (128, 576)]}
CASES = [(kind, shape) for kind in KINDS for shape in SHAPES[kind]]


def library() -> Kernels:
    assert LIBRARY is not None
    return LIBRARY


def random_matrix(kind: str, rows: int, width: int) -> tuple[GGUFMatrix, torch.Tensor]:
    """A packed matrix of random blocks, and its values as gguf dequantises them, in bfloat16."""
    reorder, ggml, size = KINDS[kind]
    rng = np.random.default_rng(rows + width)
    blocks = rng.integers(0, 256, (rows, width // 32, size), dtype=np.uint8)
    num_scales = 2 if kind == "q4_1" else 1
    scales = rng.standard_normal((rows, width // 32, num_scales)) * 10.0 ** rng.integers(-6, 3)
    blocks[:, :, : 2 * num_scales] = scales.astype(np.float16).view(np.uint8)
    file_rows = blocks.reshape(rows, -1)
    values = gguf.quants.dequantize(file_rows, ggml).reshape(rows, width)
    packed, scale_bits = reorder(file_rows)
    matrix = GGUFMatrix(kind, torch.from_numpy(packed), torch.from_numpy(scale_bits), library())
    return matrix, torch.from_numpy(values.astype(np.float32)).bfloat16()


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_every_value_is_the_dense_one(kind: str, shape: tuple[int, int]) -> None:
    """A row of activations with a single 1 picks out one column, untouched by any sum."""
    matrix, dense = random_matrix(kind, *shape)
    for first in range(0, shape[1], 8):
        picks = torch.zeros(8, shape[1], dtype=torch.bfloat16)
        picks[torch.arange(8), torch.arange(first, first + 8)] = 1
        assert torch.equal(
            matrix.product(picks, torch.float32), dense[:, first : first + 8].T.float()
        )


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_products_of_any_number_of_rows(kind: str, shape: tuple[int, int], num_rows: int) -> None:
    matrix, dense = random_matrix(kind, *shape)
    x = torch.randn(num_rows, shape[1], generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.double() @ dense.double().T
    size = x.double().abs() @ dense.double().abs().T
    wide = matrix.product(x, torch.float32)
    assert ((wide - exact).abs() <= 2e-6 * size).all()
    assert torch.equal(matrix.product(x, torch.bfloat16), wide.bfloat16())
    alone = torch.cat([matrix.product(x[i : i + 1], torch.float32) for i in range(num_rows)])
    assert torch.equal(alone, wide), "a row does not depend on the rows beside it"
