"""Packed weights hold exactly the file's values; an output does not depend on what is beside it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import gguf
import numpy as np
import pytest

from engine.checkpoint.packing import KINDS, Matrix, pack_bf16, pack_rows
from engine.kernels import kernels
from engine.kernels.decoder import MatrixStruct
from tests.support.packed_rows import dequantised, ggml_type, random_rows, scale_bytes

LIBRARY = kernels()
pytestmark = pytest.mark.skipif(
    LIBRARY is None, reason="needs a C compiler and a CPU with AVX512 and VNNI"
)
SHAPES = ((16, 32), (37, 96), (128, 576), (100, 1536))
WIDE_SHAPES = ((16, 256), (37, 512), (100, 1536))  # for blocks of 256 columns
CASES = [
    (kind, shape)
    for kind in ("bf16", *KINDS)
    for shape in (SHAPES if kind == "bf16" or KINDS[kind].columns == 32 else WIDE_SHAPES)
]


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
    rows = random_rows(kind, num_rows, width, rng, 10.0 ** rng.integers(-3, 3))
    return Matrix(kind, num_rows, width, pack_rows(kind, rows)), dequantised(kind, rows)


def product(matrix: Matrix, rows: Rows, first: int, count: int) -> np.ndarray:
    """fp32 [count, rows of the matrix] for some rows of activations, four groups a call."""
    assert LIBRARY
    num_groups = matrix.data.shape[0]
    out = np.full((count, num_groups * 16), np.nan, np.float32)
    panel = np.zeros(38 * matrix.columns, np.int16)  # `panel_bytes`
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


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_every_value_is_the_files(kind: str, shape: tuple[int, int]) -> None:
    assert LIBRARY
    matrix, values = random_matrix(kind, *shape)
    out = np.empty(shape, np.float32)
    struct = MatrixStruct.of(matrix, None)
    for row in range(shape[0]):
        at = ctypes.c_void_p(out[row].ctypes.data)
        LIBRARY.library.unpack_row(ctypes.byref(struct), row, at)
    np.testing.assert_array_equal(out, values)
    size = matrix.data.nbytes * shape[0] / (-(-shape[0] // 16) * 16)
    if kind != "bf16":
        columns, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type(kind)]
        assert size == shape[0] * shape[1] // columns * block_bytes, "no more than in the file"


@pytest.mark.parametrize(("kind", "shape"), CASES)
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_sums_fit_in_their_integers(kind: str) -> None:
    """All activations are the largest of their blocks; integers and scales are extremes."""
    columns, num_bytes = gguf.GGML_QUANT_SIZES[ggml_type(kind)]
    blocks = np.empty((4, 16, 512 // columns, num_bytes), np.uint8)
    for i, byte in enumerate((0x00, 0xFF, 0x80, 0x7F)):
        template = random_rows(kind, 16, 512, np.random.default_rng(i), 1.0)
        blocks[i] = byte
        kept = scale_bytes(kind)
        blocks[i][..., kept] = template.reshape(blocks[i].shape)[..., kept]
    rows = blocks.reshape(64, -1)
    values = dequantised(kind, rows).astype(np.float64)
    activations = Rows(np.repeat([[1.0], [-1.0]] * 7, 512, 1))
    exact = activations.x.astype(np.float64) @ values.T
    got = product(Matrix(kind, 64, 512, pack_rows(kind, rows)), activations, 0, 14)
    assert (np.abs(got - exact) <= 2e-6 * 512 * np.abs(values).max()).all()


def test_the_smallest_scales_of_mxfp4_are_subnormal() -> None:
    assert LIBRARY
    rows = np.full((16, 17), 0x77, np.uint8)
    rows[:, 0] = np.arange(16)
    struct = MatrixStruct.of(Matrix("mxfp4", 16, 32, pack_rows("mxfp4", rows)), None)
    for row, exact in enumerate(dequantised("mxfp4", rows)):
        out = np.empty(32, np.float32)
        LIBRARY.library.unpack_row(ctypes.byref(struct), row, ctypes.c_void_p(out.ctypes.data))
        np.testing.assert_array_equal(out, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_fixed_point_keeps_a_nan_and_an_empty_block(kind: str) -> None:
    x = np.zeros((14, 512), np.float32)
    x[0, 300] = np.nan
    x[2, 10] = np.inf
    rows = Rows(x)
    assert not rows.scale[1].any() and not rows.q[1].any()
    matrix, _ = random_matrix(kind, 16, 512)
    for count in (2, 14):
        out = product(matrix, rows, 0, count)
        assert np.isnan(out[0]).all() and not out[1].any()
    assert np.isnan(out[2]).all() and not out[3:].any()
