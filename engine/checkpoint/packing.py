"""The layout of weights that the CPU kernels read, which engine/kernels/matmul.h describes.

A weight [N, K] is stored by groups of sixteen rows, a group by records of 32 or 256 columns: what
the scales of sixteen rows consist of, then their values, two neighbouring columns of each row
beside each other. The types of GGUF that KINDS names keep their integers and scales: only the order
changes, and the size stays.

Integers are moved as words: numpy has no faster way to transpose bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

GROUP, BLOCK = 16, 32
Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of GGUF, and its records."""

    columns: int  # of a block of the file, and of a record
    block_bytes: int  # of the file, one row
    blocks: int  # of 32 columns, with values of their own in a record
    head_bytes: int  # of a record, before the values of its blocks
    fill: Callable[[Array, Array, Array], None]  # file's blocks, record heads, values: see `_pack`

    @property
    def record_bytes(self) -> int:
        """Of sixteen rows: as many as in the file."""
        return GROUP * self.block_bytes


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight, or several of a kind joined along their outputs, in the layout of the file."""

    kind: str  # bf16, or one of KINDS
    rows: int
    columns: int
    data: Bytes  # [groups, bytes of a group]


def _in_groups(rows: Array) -> Array:
    """[N, ...] -> [groups, 16, ...], zeros below the last row."""
    padding = -rows.shape[0] % GROUP
    if padding:
        rows = np.concatenate([rows, np.zeros((padding, *rows.shape[1:]), rows.dtype)])
    return rows.reshape(-1, GROUP, *rows.shape[1:])


def _words(blocks: Array, first: int, num_bytes: int, word: type) -> Array:
    """Bytes first .. of the file's blocks [groups, records, 16, bytes] as words."""
    words: Array = np.ascontiguousarray(blocks[..., first : first + num_bytes]).view(word)
    return words


def _to_rows(plane: Array) -> Array:
    """[groups, records, 16, n] -> [groups, records, n, 16]: what a vector of sixteen rows loads."""
    return plane.swapaxes(-1, -2)


def _halves(blocks: Array, heads: Array, count: int) -> None:
    """The first `count` fp16 numbers of a block begin the record."""
    numbers = _to_rows(_words(blocks, 0, 2 * count, np.uint16))
    heads[..., : 2 * GROUP * count].view(np.uint16).reshape(numbers.shape)[:] = numbers


def _pairs(nibbles: Array) -> Array:
    """Words of four columns, four bits each in a byte -> two bytes: columns 2 3 above 0 1."""
    pairs: Array = (nibbles | (nibbles >> 12)).astype(np.uint16)
    return pairs


def _four_bits(words: Array, lower: Array, upper: Array) -> None:
    """Words of four bytes [groups, records, 16, ..., n] give the columns of their lower and of
    their upper four bits: values [groups, records, ..., n, 16] uint16.
    """
    words = np.moveaxis(words, 2, -1)
    lower[:] = _pairs(words & 0x0F0F0F0F)
    upper[:] = _pairs((words >> 4) & 0x0F0F0F0F)


def _nibbles(values: Array) -> Array:
    """The 256 bytes of each block with four bits: [groups, records, blocks, 8, 16] uint16."""
    part = values[..., : GROUP * BLOCK // 2].view(np.uint16)
    return part.reshape(*part.shape[:-1], BLOCK // 4, GROUP)


def _half_blocks(blocks: Array, first: int, values: Array) -> None:
    """Blocks of sixteen bytes: columns 0 .. 15 in their lower bits, 16 .. 31 in their upper."""
    out = _nibbles(values)
    words = _words(blocks, first, 16 * out.shape[2], np.uint32)
    words = words.reshape(*words.shape[:-1], out.shape[2], 4)
    _four_bits(words, out[..., :4, :], out[..., 4:, :])


def _fifth_bits(words: Array, values: Array) -> None:
    """A bit a column, [groups, records, 16, blocks] uint32, behind the four bits.

    Row r of a block holds sixteen pairs of bits, by pairs of columns, and word k of the result the
    k-th pair of all rows: a matrix of pairs is transposed, by ever smaller squares.
    """
    square = np.ascontiguousarray(np.moveaxis(words, 2, 0))  # [16, groups, records, blocks]
    for size, mask in ((8, 0xFFFF), (4, 0xFF00FF), (2, 0x0F0F0F0F), (1, 0x33333333)):
        halves = square.reshape(GROUP // (2 * size), 2, size, *square.shape[1:])
        above, below = halves[:, 0], halves[:, 1]
        moved = ((above >> (2 * size)) ^ below) & np.uint32(mask)
        below ^= moved
        above ^= moved << (2 * size)
    out = values[..., GROUP * BLOCK // 2 :].view(np.uint32)
    out[:] = np.moveaxis(square, 0, -1)


def _fill_simple(num_scales: int) -> Callable[[Array, Array, Array], None]:
    """Q4_0, Q4_1, IQ4_NL: fp16 numbers, then four bits."""

    def fill(blocks: Array, heads: Array, values: Array) -> None:
        _halves(blocks, heads, num_scales)
        _half_blocks(blocks, 2 * num_scales, values)

    return fill


def _fill_q5(num_scales: int) -> Callable[[Array, Array, Array], None]:
    """Q5_0, Q5_1: the fifth bits lie between."""

    def fill(blocks: Array, heads: Array, values: Array) -> None:
        first = 2 * num_scales
        _halves(blocks, heads, num_scales)
        _half_blocks(blocks, first + 4, values)
        _fifth_bits(_words(blocks, first, 4, np.uint32), values)

    return fill


def _fill_q8_0(blocks: Array, heads: Array, values: Array) -> None:
    _halves(blocks, heads, 1)
    pairs = _to_rows(_words(blocks, 2, BLOCK, np.uint16))
    values.view(np.uint16).reshape(pairs.shape)[:] = pairs


def _fill_mxfp4(blocks: Array, heads: Array, values: Array) -> None:
    heads[:] = blocks[..., 0]
    _half_blocks(blocks, 1, values)


def _k_scales(blocks: Array, heads: Array) -> None:
    """Q4_K, Q5_K: eight scales and minima of six bits in twelve bytes."""
    _halves(blocks, heads, 2)
    twelve = np.ascontiguousarray(np.moveaxis(blocks[..., 4:16], -1, 0))
    first, second, both = twelve[:4], twelve[4:8], twelve[8:]  # [4, groups, records, 16]
    scale = np.concatenate([first & 63, (both & 15) | ((first >> 6) << 4)])
    least = np.concatenate([second & 63, (both >> 4) | ((second >> 6) << 4)])
    upper = least >> 2
    planes = np.concatenate([scale | ((least & 3) << 6), upper[::2] | (upper[1::2] << 4)])
    out = heads[..., 4 * GROUP :].reshape(*heads.shape[:2], len(planes), GROUP)
    out[:] = np.moveaxis(planes, 0, 2)


def _k_nibbles(blocks: Array, first: int, values: Array) -> None:
    """Four times 32 bytes: a block in their lower bits, the next one in their upper."""
    out = _nibbles(values)
    words = _words(blocks, first, 128, np.uint32)
    words = words.reshape(*words.shape[:-1], 4, 8)
    _four_bits(words, out[:, :, ::2], out[:, :, 1::2])


def _fill_q4_k(blocks: Array, heads: Array, values: Array) -> None:
    _k_scales(blocks, heads)
    _k_nibbles(blocks, 16, values)


def _fill_q5_k(blocks: Array, heads: Array, values: Array) -> None:
    _k_scales(blocks, heads)
    _k_nibbles(blocks, 48, values)
    columns = _words(blocks, 16, 32, np.uint64)  # a byte has a column's bits of all eight blocks
    bits = np.empty((*columns.shape[:-1], 8, 4), np.uint8)
    for block in range(8):
        ones = (columns >> np.uint64(block)) & np.uint64(0x0101010101010101)
        # The product brings the lowest bits of eight bytes together in the highest byte.
        bits[..., block, :] = (ones * np.uint64(0x0102040810204080)) >> np.uint64(56)
    _fifth_bits(bits.view(np.uint32)[..., 0], values)


def _fill_q6_k(blocks: Array, heads: Array, values: Array) -> None:
    """Twice 64 bytes of four bits, twice 32 of two bits, sixteen scales, d."""
    d, scales = _words(blocks, 208, 2, np.uint16)[..., 0], _to_rows(blocks[..., 192:208])
    heads[..., : 2 * GROUP].view(np.uint16)[:] = d
    heads[..., 2 * GROUP :].reshape(scales.shape)[:] = scales
    out = _nibbles(values)
    words = _words(blocks, 0, 128, np.uint32)
    words = words.reshape(*words.shape[:-1], 2, 2, 8)
    quarters = out.reshape(*out.shape[:2], 2, 2, 2, *out.shape[3:])  # half, lower or upper, block
    _four_bits(words, quarters[:, :, :, 0], quarters[:, :, :, 1])
    eights = np.moveaxis(_words(blocks, 128, 64, np.uint64), 2, -1)  # [groups, records, 8, 16]
    eights = eights.reshape(*eights.shape[:2], 2, 4, GROUP)
    high = values[..., GROUP * BLOCK // 2 :].view(np.uint16)
    high = high.reshape(*high.shape[:2], 2, 4, 4, GROUP)  # [.., half, block, eights, 16]
    for block in range(4):
        x = (eights >> (2 * block)) & 0x0303030303030303
        high[:, :, :, block] = (x | (x >> 14) | (x >> 28) | (x >> 42)).astype(np.uint16)


def _fill_iq4_xs(blocks: Array, heads: Array, values: Array) -> None:
    _halves(blocks, heads, 1)
    planes = _to_rows(blocks[..., [4, 5, 6, 7, 2, 3]])  # four bits of the scales, then two
    heads[..., 2 * GROUP :].reshape(planes.shape)[:] = planes
    _half_blocks(blocks, 8, values)


KINDS = {
    "q4_0": Kind(32, 18, 1, 32, _fill_simple(1)),
    "q4_1": Kind(32, 20, 1, 64, _fill_simple(2)),
    "q8_0": Kind(32, 34, 1, 32, _fill_q8_0),
    "q5_0": Kind(32, 22, 1, 32, _fill_q5(1)),
    "q5_1": Kind(32, 24, 1, 64, _fill_q5(2)),
    "q4_k": Kind(256, 144, 8, 256, _fill_q4_k),
    "q5_k": Kind(256, 176, 8, 256, _fill_q5_k),
    "q6_k": Kind(256, 210, 8, 288, _fill_q6_k),
    "iq4_nl": Kind(32, 18, 1, 32, _fill_simple(1)),
    "iq4_xs": Kind(256, 136, 8, 128, _fill_iq4_xs),
    "mxfp4": Kind(32, 17, 1, 16, _fill_mxfp4),
}


def pack_rows(kind: str, rows: Bytes) -> Bytes:
    """Rows of a GGUF tensor of type `kind`, [N, bytes], -> data."""
    k = KINDS[kind]
    grouped = _in_groups(rows.reshape(rows.shape[0], -1, k.block_bytes)).swapaxes(1, 2)
    groups, records = grouped.shape[:2]
    out = np.empty((groups, records, k.record_bytes), np.uint8)
    values = out[..., k.head_bytes :].reshape(groups, records, k.blocks, -1)
    k.fill(grouped, out[..., : k.head_bytes], values)
    return out.reshape(groups, -1)


def pack_bf16(values: npt.NDArray[np.uint16]) -> Bytes:
    """Bits of bfloat16 [N, K] -> data."""
    pairs = _in_groups(np.ascontiguousarray(values).view(np.uint32)).swapaxes(1, 2)
    return np.ascontiguousarray(pairs).reshape(pairs.shape[0], -1).view(np.uint8)


def group_bytes(kind: str, columns: int) -> int:
    """Bytes of sixteen rows of so many columns."""
    if kind == "bf16":
        return GROUP * 2 * columns
    return columns // KINDS[kind].columns * KINDS[kind].record_bytes


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
        return -(-self.rows // GROUP), group_bytes(self.kind, columns)


def entry_name(name: str, runs: Sequence[Run]) -> str:
    """`3.qkv.q4_1.960`, or `3.qkv.q4_1.768+q8_0.192` where the kind changes."""
    return f"{name}." + "+".join(f"{run.kind}.{run.rows}" for run in runs)


def runs_of(entry_name: str) -> tuple[str, list[Run]]:
    """The inverse of `entry_name`. Raises ValueError for other names."""
    first, *rest = entry_name.split("+")
    name, kind, rows = first.rsplit(".", 2)
    pairs = [(kind, rows), *(part.split(".") for part in rest)]
    runs = [Run(kind, int(rows)) for kind, rows in pairs]
    if any((run.kind != "bf16" and run.kind not in KINDS) or run.rows <= 0 for run in runs):
        raise ValueError(entry_name)
    return name, runs


def entry_shape(runs: Sequence[Run], columns: int) -> tuple[int, ...]:
    """Of one run its groups; of several all bytes, one run after the other."""
    shapes = [run.shape(columns) for run in runs]
    return shapes[0] if len(shapes) == 1 else (sum(a * b for a, b in shapes),)
