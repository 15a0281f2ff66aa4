"""Rows of quantised tensors from random bytes: the `gguf` package dequantises every type, but
quantises only some.
"""

from __future__ import annotations

import gguf
import numpy as np

_TWO_SCALES = ("q4_1", "q5_1", "q4_k", "q5_k")
# The largest value of a scale of 1; of two scales the larger part.
_LARGEST = {"q4_k": 63 * 15, "q5_k": 63 * 31, "q6_k": 128 * 32, "iq4_nl": 127, "iq4_xs": 32 * 127}


def scale_bytes(kind: str) -> slice:
    """Where the fp16 scales of a block are, or its exponent."""
    if kind in ("q6_k", "q2_k"):
        return slice(208, 210) if kind == "q6_k" else slice(80, 84)
    return slice(1 if kind == "mxfp4" else 4 if kind in _TWO_SCALES else 2)


def ggml_type(kind: str) -> gguf.GGMLQuantizationType:
    """The package's name of a type."""
    return gguf.GGMLQuantizationType[kind.upper()]


def random_rows(
    kind: str, num_rows: int, width: int, rng: np.random.Generator, size: float
) -> np.ndarray:
    """[num_rows, bytes]: random integers, and scales that give values of about `size`."""
    columns, num_bytes = gguf.GGML_QUANT_SIZES[ggml_type(kind)]
    blocks = rng.integers(0, 256, (num_rows, width // columns, num_bytes), dtype=np.uint8)
    if kind == "mxfp4":
        exponents = int(np.log2(size)) + rng.integers(122, 126, blocks.shape[:-1])
        blocks[..., 0] = exponents
        return blocks.reshape(num_rows, -1)
    place = blocks[..., scale_bytes(kind)]
    scales = rng.standard_normal((*place.shape[:-1], place.shape[-1] // 2))
    place[:] = (scales * size / _LARGEST.get(kind, 16)).astype(np.float16).view(np.uint8)
    return blocks.reshape(num_rows, -1)


def dequantised(kind: str, rows: np.ndarray) -> np.ndarray:
    """fp32 [num_rows, width] by the reference of the `gguf` package."""
    values: np.ndarray = gguf.quants.dequantize(rows, ggml_type(kind))
    return values.reshape(rows.shape[0], -1)
