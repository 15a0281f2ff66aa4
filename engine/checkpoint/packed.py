"""Weights in the layout of the CPU kernels (engine/kernels/matmul.h), made once and kept.

A weight [N, K] is stored by groups of sixteen rows, a group by records of 32 columns: their scales,
then their values, two neighbouring columns of each row beside each other:

    record   | d of 16 rows | (m of 16 rows) | columns 0 1 of rows 0..15 | columns 2 3 of ... |

GGUF's Q4_0, Q4_1 and Q8_0 keep their integers and scales: only the order changes. Weights of other
types, and all weights under `--weights bf16`, are rounded to bfloat16. `--weights int8` and `int4`
quantise again, which is a numeric profile of its own.

Each (checkpoint, choice) is one entry of the cache (kept.py). Torch is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.base.errors import CheckpointError
from engine.checkpoint.gguf_weights import PackedTensor, cast, dequantize
from engine.checkpoint.kept import kept
from engine.checkpoint.shards import TensorEntry, read_header, write_shard
from engine.checkpoint.source import Checkpoint
from engine.models.architecture import TensorSpec, architecture_of
from engine.models.config import ModelConfig
from engine.telemetry.progress import bar

GROUP, BLOCK = 16, 32
_VERSION = 1  # part of the entry's name: raise it with the layout
_FILE = "weights.safetensors"
_PIECE_BYTES = 64 << 20  # of fp32 at a time
_RECORD_BYTES = {"bf16": 1024, "q4_0": 288, "q4_1": 320, "q8_0": 544}  # 16 rows x 32 columns
_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight, or several joined along their outputs, in the layout of the file."""

    kind: str  # bf16, q4_0, q4_1 or q8_0
    rows: int
    columns: int
    data: _Bytes  # [groups, bytes of a group]


# -- the layout ------------------------------------------------------------------------------------


def _in_groups(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[N, ...] -> [groups, 16, ...], zeros below the last row."""
    padding = -rows.shape[0] % GROUP
    if padding:
        rows = np.concatenate([rows, np.zeros((padding, *rows.shape[1:]), rows.dtype)])
    return rows.reshape(-1, GROUP, *rows.shape[1:])


def _records(scales: Sequence[_Bytes], values: npt.NDArray[Any]) -> _Bytes:
    """Scales [groups, 16, blocks, 2] bytes each and values [groups, 16, blocks, n] -> data."""
    groups, _, blocks = values.shape[:3]
    heads = [s.transpose(0, 2, 1, 3).reshape(groups, blocks, -1) for s in scales]
    # [groups, 16, blocks, pairs, bytes of a pair] -> [groups, blocks, pairs, 16, bytes]
    body = values.transpose(0, 2, 3, 1, 4).reshape(groups, blocks, -1)
    return np.concatenate([*heads, body], axis=2).reshape(groups, -1)


def _four_bits(blocks: _Bytes, num_scales: int) -> _Bytes:
    """GGUF rows [N, blocks, 2 * num_scales + 16] -> data."""
    grouped = _in_groups(blocks)
    scales = [grouped[..., 2 * i : 2 * i + 2] for i in range(num_scales)]
    q = grouped[..., 2 * num_scales :]
    columns = np.concatenate([q & 15, q >> 4], axis=-1)  # [groups, 16, blocks, 32], in order
    fours = columns.reshape(*columns.shape[:-1], BLOCK // 4, 4)
    return _records(scales, fours[..., :2] | (fours[..., 2:] << 4))


def _eight_bits(blocks: _Bytes) -> _Bytes:
    """GGUF rows [N, blocks, 2 + 32] -> data."""
    grouped = _in_groups(blocks)
    q = grouped[..., 2:]
    return _records([grouped[..., :2]], q.reshape(*q.shape[:-1], BLOCK // 2, 2))


def pack_bf16(values: npt.NDArray[np.uint16]) -> _Bytes:
    """Bits of bfloat16 [N, K] -> data."""
    grouped = _in_groups(values.reshape(values.shape[0], -1, BLOCK // 2, 2))
    return _records([], grouped).view(np.uint8)


def pack_rows(kind: str, rows: _Bytes) -> _Bytes:
    """Rows of a GGUF tensor of type `kind`, [N, bytes], -> data."""
    block_bytes = {"q4_0": 18, "q4_1": 20, "q8_0": 34}[kind]
    blocks = rows.reshape(rows.shape[0], -1, block_bytes)
    if kind == "q8_0":
        return _eight_bits(blocks)
    return _four_bits(blocks, 2 if kind == "q4_1" else 1)


def quantise(kind: str, values: _Floats) -> _Bytes:
    """fp32 [N, K] -> rows of a GGUF tensor of type `kind` (by the `gguf` package)."""
    import gguf

    ggml = gguf.GGMLQuantizationType[kind.upper()]
    rows: _Bytes = gguf.quants.quantize(np.ascontiguousarray(values), ggml)
    return rows


# -- where weights come from -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor of the checkpoint: in its packing, if a kernel takes that, or as fp32."""

    path: Path
    shape: tuple[int, ...]
    kind: str  # q4_0, q4_1, q8_0; "" for any other
    rows: Callable[[], _Bytes]  # packed
    values: Callable[[int, int], _Floats]  # of rows first .. end - 1; a vector is one row


def _tensors(checkpoint: Checkpoint) -> Mapping[str, _Tensor]:
    if checkpoint.gguf is not None:
        from engine.checkpoint.gguf import open_gguf

        path = checkpoint.gguf
        packed = open_gguf(path).packed(checkpoint.config)
        return {t.name: _of_gguf(path, t) for t in packed}
    from engine.checkpoint.source import weights

    found: dict[str, _Tensor] = {}
    for entry in chain.from_iterable(map(read_header, weights(checkpoint, "bfloat16"))):
        if entry.name in found:
            other = found[entry.name].path
            raise CheckpointError(f"{entry.path}: tensor {entry.name} is in {other} already")
        found[entry.name] = _of_entry(entry)
    return found


def _of_gguf(path: Path, t: PackedTensor) -> _Tensor:
    kind = t.kind.name.lower()
    return _Tensor(
        path,
        t.shape,
        kind if kind in ("q4_0", "q4_1", "q8_0") else "",
        t.rows,
        lambda first, end: dequantize(t.rows()[first:end], t.kind, f"{path}: {t.gguf_name}"),
    )


def _of_entry(entry: TensorEntry) -> _Tensor:
    kinds = {"BF16": np.uint16, "F32": np.float32, "F16": np.float16}

    def values(first: int, end: int) -> _Floats:
        if entry.dtype not in kinds:
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name} has type {entry.dtype}, expected plain floats"
            )
        raw = np.memmap(entry.path, np.uint8, "r", entry.offset, (entry.num_bytes,))
        rows = raw.view(kinds[entry.dtype]).reshape(-1, entry.shape[-1])[first:end]
        if entry.dtype == "BF16":
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)

    return _Tensor(entry.path, entry.shape, "", lambda: np.empty((0, 0), np.uint8), values)


# -- what a model consists of ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Joined:
    """A tensor of the file, and those of the checkpoint that it joins."""

    name: str
    parts: tuple[TensorSpec, ...]

    @property
    def rows(self) -> int:
        return sum(part.shape[0] for part in self.parts)

    @property
    def columns(self) -> int:
        return self.parts[0].shape[1]


def _joined(config: ModelConfig) -> tuple[list[_Joined], list[_Joined]]:
    """(matrices, vectors) in the order of the architecture's list."""
    specs = architecture_of(config).tensors(config)
    groups = [_Joined(name, tuple(parts)) for name, parts in groupby(specs, lambda s: s.joined)]
    matrices = [group for group in groups if len(group.parts[0].shape) == 2]
    return matrices, [group for group in groups if len(group.parts[0].shape) == 1]


def _check(source: Mapping[str, _Tensor], checkpoint: Checkpoint) -> None:
    """The checkpoint has the tensors of its architecture and no others. Raises CheckpointError."""
    config = checkpoint.config
    shapes = {spec.hf_name: spec.shape for spec in architecture_of(config).tensors(config)}
    missing = [name for name in shapes if name not in source]
    if missing:
        where = checkpoint.gguf or checkpoint.folder
        raise CheckpointError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all)")
    for name, tensor in source.items():
        follows = name.endswith("rotary_emb.inv_freq")
        if follows or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        if name not in shapes:
            raise CheckpointError(
                f"{tensor.path}: unexpected tensor {name} in a {config.architecture}"
            )
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}, "
                f"expected {list(shapes[name])}"
            )


# -- the file --------------------------------------------------------------------------------------


def packed_file(checkpoint: Checkpoint, choice: str, *, read: bool = True) -> Path:
    """The file for `choice` (auto, bf16, int8 or int4), made on the first call.

    `read` as `kept` has it. Raises CheckpointError.
    """

    def make(folder: Path) -> None:
        _write(folder / _FILE, checkpoint, choice)
        checkpoint.check_unchanged()

    name = f"{checkpoint.fingerprint}-{choice}-{_VERSION}"
    return kept("packed", name, make, read=read) / _FILE


def _kind(matrix: _Joined, source: Mapping[str, _Tensor], choice: str) -> str:
    """How the matrix is packed: as it was, if its parts were alike."""
    kinds = {source[part.hf_name].kind for part in matrix.parts}
    if choice == "auto" and len(kinds) == 1 and (kind := min(kinds)):
        return kind
    # A second rounding to 4 bits would cost most in the vocabulary.
    if choice == "int8" or (choice == "int4" and "." not in matrix.name):
        return "q8_0"
    return "q4_1" if choice == "int4" else "bf16"


def _packed(tensor: _Tensor, kind: str) -> Iterator[_Bytes]:
    """A weight's data, a bounded number of whole groups at a time."""
    num_rows, num_columns = tensor.shape
    rows = tensor.rows() if kind == tensor.kind else None
    step = max(GROUP, _PIECE_BYTES // (4 * num_columns) // GROUP * GROUP)
    for first in range(0, num_rows, step):
        end = min(first + step, num_rows)
        if rows is not None:
            yield pack_rows(kind, rows[first:end])
        elif kind == "bf16":
            yield pack_bf16(cast(tensor.values(first, end), "bfloat16", str(tensor.path)))
        else:
            yield pack_rows(kind, quantise(kind, tensor.values(first, end)))


def _write(path: Path, checkpoint: Checkpoint, choice: str) -> None:
    source = _tensors(checkpoint)
    _check(source, checkpoint)
    matrices, vectors = _joined(checkpoint.config)
    kinds = {m.name: _kind(m, source, choice) for m in matrices}
    header = [
        (_entry_name(m, kinds[m.name]), "U8", _data_shape(kinds[m.name], m.rows, m.columns))
        for m in matrices
    ]
    header += [(v.name, "F32", (v.rows,)) for v in vectors]

    def arrays() -> Iterator[npt.NDArray[Any]]:
        title = f"Packing {checkpoint.name} ({choice})"
        for matrix in bar(matrices, desc=title):
            for part in matrix.parts:  # each has whole groups: see kernels/decoder.py
                yield from _packed(source[part.hf_name], kinds[matrix.name])
        for vector in vectors:
            for part in vector.parts:
                yield source[part.hf_name].values(0, 1) + np.float32(part.offset)

    write_shard(path, header, (np.ascontiguousarray(a).data.cast("B") for a in arrays()))


def _entry_name(matrix: _Joined, kind: str) -> str:
    return f"{matrix.name}.{kind}.{matrix.rows}"


def _data_shape(kind: str, rows: int, columns: int) -> tuple[int, ...]:
    return -(-rows // GROUP), columns // BLOCK * _RECORD_BYTES[kind]


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """The tensors of a file, memory-mapped and shared by all processes that map it."""

    matrices: Mapping[str, Matrix]  # "3.qkv", ..., "embedding", "head"
    vectors: Mapping[str, _Floats]  # "3.input_norm", ..., "norm"; "3.qkv.bias" where there is one


def read_packed(path: Path, config: ModelConfig) -> PackedWeights:
    """Map the file. Raises CheckpointError where it is not this model's: the kernels trust it."""
    mapped = np.memmap(path, np.uint8, "r")
    entries = {entry.name: entry for entry in read_header(path)}

    def raw(name: str, dtype: str, shape: tuple[int, ...]) -> _Bytes:
        entry = entries.get(name)
        if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
            raise CheckpointError(f"{path}: has no {name} of this model's shape; remove the file")
        return mapped[entry.offset : entry.offset + entry.num_bytes]

    matrices, vectors = _joined(config)
    found = {}
    for m in matrices:
        names = {kind: _entry_name(m, kind) for kind in _RECORD_BYTES}
        kind = next((kind for kind, name in names.items() if name in entries), "bf16")
        shape = _data_shape(kind, m.rows, m.columns)
        found[m.name] = Matrix(
            kind, m.rows, m.columns, raw(names[kind], "U8", shape).reshape(shape)
        )
    return PackedWeights(
        found, {v.name: raw(v.name, "F32", (v.rows,)).view(np.float32) for v in vectors}
    )
