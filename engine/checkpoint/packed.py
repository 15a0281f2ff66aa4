"""Weights in the layout of the CPU kernels (engine/kernels/matmul.h), made once and kept.

The types that packing.py lists keep their integers and scales: only the order changes. Weights of
other types, and all weights under `--weights bf16`, are rounded to bfloat16. `--weights int8` and
`int4` quantise again, which is a numeric profile of its own.

Each (checkpoint, choice) is one entry of the cache (kept.py). Torch is not needed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.base.errors import CheckpointError
from engine.checkpoint.gguf_header import TYPES
from engine.checkpoint.gguf_parts import find_parts
from engine.checkpoint.gguf_weights import cast
from engine.checkpoint.kept import kept
from engine.checkpoint.packing import (
    GROUP,
    KINDS,
    Bytes,
    Floats,
    Matrix,
    Run,
    entry_name,
    entry_shape,
    pack_bf16,
    pack_rows,
    quantise,
    runs_of,
)
from engine.checkpoint.shards import read_header, write_shard
from engine.checkpoint.source import Checkpoint
from engine.checkpoint.source_tensors import SourceTensor, in_order, source_tensors, vector
from engine.models.architecture import TensorSpec, architecture_of
from engine.models.config import ModelConfig
from engine.telemetry.log import get_logger
from engine.telemetry.progress import bar

_log = get_logger(__name__)
_FIRST_KINDS = {"q4_0", "q4_1", "q8_0"}  # of version 1, which kept parts of one kind only
_FILE = "weights.safetensors"
_FLOATS = ("F64", "F32", "F16", "BF16")
_PIECE_BYTES = 2 << 20  # of fp32 at a time: what caches hold


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

    @property
    def is_packed(self) -> bool:
        return len(self.parts[0].shape) == 2 and not self.parts[0].exact

    @property
    def numbers(self) -> int:
        """How many there are, where they are not packed."""
        return sum(math.prod(part.shape) for part in self.parts)


def _joined(config: ModelConfig) -> tuple[list[_Joined], list[_Joined]]:
    """(matrices, vectors and what else is fp32) in the order of the architecture's list."""
    specs = architecture_of(config).tensors(config)
    groups = [_Joined(name, tuple(parts)) for name, parts in groupby(specs, lambda s: s.joined)]
    matrices = [group for group in groups if group.is_packed]
    return matrices, [group for group in groups if not group.is_packed]


# -- the file --------------------------------------------------------------------------------------


def packed_file(checkpoint: Checkpoint, choice: str, *, read: bool = True) -> Path:
    """The file for `choice` (auto, bf16, int8 or int4), made on the first call.

    `read` as `kept` has it. Raises CheckpointError.
    """

    def make(folder: Path) -> None:
        _write(folder / _FILE, checkpoint, choice)
        checkpoint.check_unchanged()

    name = f"{checkpoint.fingerprint}-{choice}-{layout_version(checkpoint, choice)}"
    return kept("packed", name, make, read=read) / _FILE


def layout_version(checkpoint: Checkpoint, choice: str) -> int:
    """2 where a file keeps types that version 1 rounded to bfloat16; 1 where both are the same."""
    if choice != "auto" or checkpoint.gguf is None:
        return 1
    tensors = find_parts(checkpoint.gguf).tensors()
    types = {tensor.name: TYPES[tensor.kind][0].lower() for tensor in tensors}
    for matrix in _joined(checkpoint.config)[0]:
        found = {types.get(part.gguf_name, "") for part in matrix.parts}
        kept_kinds = found & KINDS.keys()
        if kept_kinds and (len(found) > 1 or not found <= _FIRST_KINDS):
            return 2
    return 1


def _kind(matrix: _Joined, tensor: SourceTensor, choice: str) -> str:
    """How a part of the matrix is packed: as it was, if a kernel takes that."""
    if choice == "auto" and tensor.kind:
        return tensor.kind
    # A second rounding to 4 bits would cost most in the vocabulary.
    if choice == "int8" or (choice == "int4" and "." not in matrix.name):
        return "q8_0"
    return "q4_1" if choice == "int4" else "bf16"


def _kinds(matrix: _Joined, source: Mapping[str, SourceTensor], choice: str) -> list[str]:
    """The kind of each part of the matrix."""
    return [_kind(matrix, source[part.hf_name], choice) for part in matrix.parts]


def _runs(matrix: _Joined, kinds: Sequence[str]) -> list[Run]:
    """Parts of one kind that follow one another are one matrix: a product takes them at once."""
    runs = []
    for kind, group in groupby(zip(kinds, matrix.parts, strict=True), lambda pair: pair[0]):
        runs.append(Run(kind, sum(part.shape[0] for _, part in group)))
    return runs


def _packed(tensor: SourceTensor, kind: str) -> Iterator[Bytes]:
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


def _report_widened(checkpoint: Checkpoint, source: Mapping[str, SourceTensor]) -> None:
    """Log the quantised types that no kernel multiplies."""
    unknown = (t.type_name for t in source.values() if not t.kind)
    for name, count in sorted(Counter(unknown).items()):
        if name not in _FLOATS:
            _log.warning(
                f"{name} is widened to bfloat16, more memory than in the file: "
                "no kernel keeps this type packed",
                path=str(checkpoint.gguf),
                tensors=count,
            )


def _write(path: Path, checkpoint: Checkpoint, choice: str) -> None:
    source = source_tensors(checkpoint)
    matrices, vectors = _joined(checkpoint.config)
    kinds = {m.name: _kinds(m, source, choice) for m in matrices}
    if choice == "auto":
        _report_widened(checkpoint, source)
    header: list[tuple[str, str, tuple[int, ...]]] = []
    for m in matrices:
        runs = _runs(m, kinds[m.name])
        header.append((entry_name(m.name, runs), "U8", entry_shape(runs, m.columns)))
    header += [(v.name, "F32", (v.numbers,)) for v in vectors]

    def arrays() -> Iterator[npt.NDArray[Any]]:
        title = f"Packing {checkpoint.name} ({choice})"
        for matrix in bar(matrices, desc=title):
            for kind, part in zip(kinds[matrix.name], matrix.parts, strict=True):
                tensor = in_order(source[part.hf_name], part)
                yield from _packed(tensor, kind)  # whole groups: kernels/decoder.py
        for group in vectors:
            for part in group.parts:
                yield vector(source[part.hf_name], part)

    write_shard(path, header, (np.ascontiguousarray(a).data.cast("B") for a in arrays()))


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """The tensors of a file, memory-mapped and shared by all processes that map it."""

    # "3.qkv", ..., "embedding", "head"; several where the kind changes
    matrices: Mapping[str, tuple[Matrix, ...]]
    vectors: Mapping[str, Floats]  # "3.input_norm", ..., "norm"; "3.qkv.bias" where there is one


def read_packed(path: Path, config: ModelConfig) -> PackedWeights:
    """Map the file. Raises CheckpointError where it is not this model's: the kernels trust it."""
    mapped = np.memmap(path, np.uint8, "r")
    entries = {entry.name: entry for entry in read_header(path)}

    def wrong(name: str) -> CheckpointError:
        return CheckpointError(f"{path}: has no {name} of this model's shape; remove the file")

    def raw(name: str, dtype: str, shape: tuple[int, ...]) -> Bytes:
        entry = entries.get(name)
        if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
            raise wrong(name)
        return mapped[entry.offset : entry.offset + entry.num_bytes]

    runs = _runs_by_name(entries)
    matrices, vectors = _joined(config)
    found = {}
    for m in matrices:
        parts = runs.get(m.name, [])
        if sum(part.rows for part in parts) != m.rows:
            raise wrong(m.name)
        data = raw(entry_name(m.name, parts), "U8", entry_shape(parts, m.columns))
        found[m.name] = tuple(_cut(data, parts, m.columns))
    return PackedWeights(
        found, {v.name: raw(v.name, "F32", (v.numbers,)).view(np.float32) for v in vectors}
    )


def _runs_by_name(entries: Iterable[str]) -> dict[str, list[Run]]:
    """Runs of each matrix of a file."""
    found = {}
    for entry in entries:
        with suppress(ValueError):  # of a vector
            name, runs = runs_of(entry)
            found[name] = runs
    return found


def _cut(data: Bytes, runs: Sequence[Run], columns: int) -> Iterator[Matrix]:
    first = 0
    for run in runs:
        groups, size = run.shape(columns)
        end = first + groups * size
        yield Matrix(run.kind, run.rows, columns, data[first:end].reshape(groups, size))
        first = end
