"""Packed weights hold exactly the file's values; an output does not depend on what is beside it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import gguf
import numpy as np
import pytest

from engine.checkpoint.packing import Matrix, pack_bf16, pack_rows
from engine.kernels import kernels
from engine.kernels.decoder import MatrixStruct

LIBRARY = kernels()
pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="needs a C compiler and a CPU with AVX512 and VNNI"
)
QUANTS = gguf.GGMLQuantizationType
KINDS = ("q4_0", "q4_1", "q8_0", "bf16")
SHAPES = ((16, 32), (37, 96), (128, 576), (100, 1536))


class Operand(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "q", "scale", "sum", "count")),
        ("columns", ctypes.c_int),
    )


@dataclass
class Rows:
    """Activations fp32 [M, K] in the form that `product` takes; owns the arrays."""

    x: np.ndarray

    def __post_init__(self) -> None:
        assert LIBRARY
        self.x = np.ascontiguousarray(self.x, np.float32)
        num_rows, width = self.x.shape
        self.q = np.zeros((num_rows, width), np.int16)
        self.scale, self.sum = (np.zeros((num_rows, width // 32), np.float32) for _ in "ab")
        self.count = np.zeros((num_rows, width // 32), np.int32)
        parts = (self.x, self.q, self.scale, self.sum, self.count)
        self.struct = Operand(*(part.ctypes.data for part in parts), width)
        for row in range(num_rows):
            LIBRARY.library.quantise(ctypes.byref(self.struct), row, 0, width)


def random_matrix(kind: str, num_rows: int, width: int) -> tuple[Matrix, np.ndarray]:
    """A packed matrix of random blocks, and its values as the gguf package dequantises them."""
    rng = np.random.default_rng(num_rows + width)
    if kind == "bf16":
        bits = rng.standard_normal((num_rows, width)).astype(np.float32).view(np.uint32) >> 16
        values = (bits << 16).view(np.float32)
        return Matrix(kind, num_rows, width, pack_bf16(bits.astype(np.uint16))), values
    size = {"q4_0": 18, "q4_1": 20, "q8_0": 34}[kind]
    blocks = rng.integers(0, 256, (num_rows, width // 32, size), dtype=np.uint8)
    num_scales = 2 if kind == "q4_1" else 1
    scales = rng.standard_normal((num_rows, width // 32, num_scales)) * 10.0 ** rng.integers(-4, 2)
    blocks[:, :, : 2 * num_scales] = scales.astype(np.float16).view(np.uint8)
    rows = blocks.reshape(num_rows, -1)
    values = gguf.quants.dequantize(rows, QUANTS[kind.upper()]).reshape(num_rows, width)
    return Matrix(kind, num_rows, width, pack_rows(kind, rows)), values


def product(matrix: Matrix, rows: Rows, first: int, count: int) -> np.ndarray:
    """fp32 [count, rows of the matrix] for some rows of activations, four groups a call."""
    assert LIBRARY
    num_groups = matrix.data.shape[0]
    out = np.full((count, num_groups * 16), np.nan, np.float32)
    panel = np.zeros(64 * matrix.columns, np.int16)
    struct = MatrixStruct.of(matrix, None)
    for group in range(0, num_groups, 4):
        LIBRARY.library.product(
            ctypes.byref(struct),
            group,
            min(4, num_groups - group),
            ctypes.byref(rows.struct),
            first,
            count,
            ctypes.c_void_p(out.ctypes.data + group * 64),
            num_groups * 16,
            ctypes.c_void_p(panel.ctypes.data),
        )
    return out[:, : matrix.rows]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_value_is_the_files(kind: str, shape: tuple[int, int]) -> None:
    assert LIBRARY
    matrix, values = random_matrix(kind, *shape)
    out = np.empty(shape, np.float32)
    struct = MatrixStruct.of(matrix, None)
    for row in range(shape[0]):
        at = ctypes.c_void_p(out[row].ctypes.data)
        LIBRARY.library.unpack_row(ctypes.byref(struct), row, at)
    # d * q + m: the package rounds twice where the kernel rounds once.
    np.testing.assert_allclose(out, values, rtol=1e-6, atol=1e-6 * np.abs(values).max())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_any_number_of_rows(kind: str, shape: tuple[int, int]) -> None:
    matrix, values = random_matrix(kind, *shape)
    rng = np.random.default_rng(7)
    rows = Rows(rng.standard_normal((40, shape[1])) * np.exp(rng.standard_normal((40, shape[1]))))
    whole = product(matrix, rows, 0, 40)
    exact = rows.x.astype(np.float64) @ values.astype(np.float64).T
    # A block's values are kept to 2**-16 of its largest; sums of them are fp32.
    size = np.abs(rows.x).max() * np.abs(values).sum(1).astype(np.float64)
    assert (np.abs(whole - exact) <= (2.0**-16 + 1e-6) * size).all()
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 17, 25):
        part = product(matrix, rows, 3, count)
        assert np.array_equal(part, whole[3 : 3 + count]), f"{count} rows"


def test_fixed_point_keeps_a_nan_and_an_empty_block() -> None:
    x = np.zeros((2, 64), np.float32)
    x[0, 40] = np.nan
    rows = Rows(x)
    assert not rows.scale[1].any() and not rows.q[1].any()
    matrix, _ = random_matrix("q4_1", 16, 64)
    out = product(matrix, rows, 0, 2)
    assert np.isnan(out[0]).all() and not out[1].any()
