"""The layout of weights that the CPU kernels read (engine/kernels/matmul.h).

A weight [N, K] is stored by groups of sixteen rows, a group by records of 32 columns: their scales,
then their values, two neighbouring columns of each row beside each other:

    record   | d of 16 rows | (m of 16 rows) | columns 0 1 of rows 0..15 | columns 2 3 of ... |

GGUF's Q4_0, Q4_1 and Q8_0 keep their integers and scales: only the order changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

GROUP, BLOCK = 16, 32
RECORD_BYTES = {"bf16": 1024, "q4_0": 288, "q4_1": 320, "q8_0": 544}  # 16 rows x 32 columns
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight, or several of a kind joined along their outputs, in the layout of the file."""

    kind: str  # bf16, q4_0, q4_1 or q8_0
    rows: int
    columns: int
    data: Bytes  # [groups, bytes of a group]


def _in_groups(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[N, ...] -> [groups, 16, ...], zeros below the last row."""
    padding = -rows.shape[0] % GROUP
    if padding:
        rows = np.concatenate([rows, np.zeros((padding, *rows.shape[1:]), rows.dtype)])
    return rows.reshape(-1, GROUP, *rows.shape[1:])


def _records(scales: Sequence[Bytes], values: npt.NDArray[Any]) -> Bytes:
    """Scales [groups, 16, blocks, 2] bytes each and values [groups, 16, blocks, n] -> data."""
    groups, _, blocks = values.shape[:3]
    heads = [s.transpose(0, 2, 1, 3).reshape(groups, blocks, -1) for s in scales]
    # [groups, 16, blocks, pairs, bytes of a pair] -> [groups, blocks, pairs, 16, bytes]
    body = values.transpose(0, 2, 3, 1, 4).reshape(groups, blocks, -1)
    return np.concatenate([*heads, body], axis=2).reshape(groups, -1)


def _four_bits(blocks: Bytes, num_scales: int) -> Bytes:
    """GGUF rows [N, blocks, 2 * num_scales + 16] -> data."""
    grouped = _in_groups(blocks)
    scales = [grouped[..., 2 * i : 2 * i + 2] for i in range(num_scales)]
    q = grouped[..., 2 * num_scales :]
    columns = np.concatenate([q & 15, q >> 4], axis=-1)  # [groups, 16, blocks, 32], in order
    fours = columns.reshape(*columns.shape[:-1], BLOCK // 4, 4)
    return _records(scales, fours[..., :2] | (fours[..., 2:] << 4))


def _eight_bits(blocks: Bytes) -> Bytes:
    """GGUF rows [N, blocks, 2 + 32] -> data."""
    grouped = _in_groups(blocks)
    q = grouped[..., 2:]
    return _records([grouped[..., :2]], q.reshape(*q.shape[:-1], BLOCK // 2, 2))


def pack_bf16(values: npt.NDArray[np.uint16]) -> Bytes:
    """Bits of bfloat16 [N, K] -> data."""
    grouped = _in_groups(values.reshape(values.shape[0], -1, BLOCK // 2, 2))
    return _records([], grouped).view(np.uint8)


def pack_rows(kind: str, rows: Bytes) -> Bytes:
    """Rows of a GGUF tensor of type `kind`, [N, bytes], -> data."""
    block_bytes = {"q4_0": 18, "q4_1": 20, "q8_0": 34}[kind]
    blocks = rows.reshape(rows.shape[0], -1, block_bytes)
    if kind == "q8_0":
        return _eight_bits(blocks)
    return _four_bits(blocks, 2 if kind == "q4_1" else 1)


def quantise(kind: str, values: Floats) -> Bytes:
    """fp32 [N, K] -> rows of a GGUF tensor of type `kind` (by the `gguf` package)."""
    import gguf

    ggml = gguf.GGMLQuantizationType[kind.upper()]
    rows: Bytes = gguf.quants.quantize(np.ascontiguousarray(values), ggml)
    return rows


@dataclass(frozen=True, slots=True)
class Run:
    """Rows of a joined tensor that are of one kind."""

    kind: str
    rows: int

    def shape(self, columns: int) -> tuple[int, int]:
        """[groups, bytes of a group]."""
        return -(-self.rows // GROUP), columns // BLOCK * RECORD_BYTES[self.kind]


def entry_name(name: str, runs: Sequence[Run]) -> str:
    """`3.qkv.q4_1.960`, or `3.qkv.q4_1.768+q8_0.192` where the kind changes."""
    return f"{name}." + "+".join(f"{run.kind}.{run.rows}" for run in runs)


def runs_of(entry_name: str) -> tuple[str, list[Run]]:
    """The inverse of `entry_name`. Raises ValueError for other names."""
    first, *rest = entry_name.split("+")
    name, kind, rows = first.rsplit(".", 2)
    pairs = [(kind, rows), *(part.split(".") for part in rest)]
    runs = [Run(kind, int(rows)) for kind, rows in pairs]
    if any(run.kind not in RECORD_BYTES or run.rows <= 0 for run in runs):
        raise ValueError(entry_name)
    return name, runs


def entry_shape(runs: Sequence[Run], columns: int) -> tuple[int, ...]:
    """Of one run its groups; of several all bytes, one run after the other."""
    shapes = [run.shape(columns) for run in runs]
    return shapes[0] if len(shapes) == 1 else (sum(a * b for a, b in shapes),)
