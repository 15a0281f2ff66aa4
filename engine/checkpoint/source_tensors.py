"""The tensors of a checkpoint as the packer takes them, whatever file they are in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from engine.base.errors import CheckpointError
from engine.checkpoint.fused import ExpertTensor, entry_array, expert_tensors, floats
from engine.checkpoint.gguf_weights import PackedTensor
from engine.checkpoint.packing import KINDS, Bytes, Floats
from engine.checkpoint.shards import TensorEntry, read_header
from engine.checkpoint.source import Checkpoint
from engine.models.architecture import TensorSpec, architecture_of, listed_name


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the checkpoint: in its packing, if a kernel takes that, or as fp32."""

    path: Path
    shape: tuple[int, ...]
    type_name: str  # the file's: Q4_K, BF16
    kind: str  # one of KINDS; "" for any other
    rows: Callable[[], Bytes]  # packed
    values: Callable[[int, int], Floats]  # of rows first .. end - 1; a vector is one row


def source_tensors(checkpoint: Checkpoint) -> Mapping[str, SourceTensor]:
    """By Hugging Face name: those of the architecture's list, and no others.

    Raises CheckpointError.
    """
    tensors = _tensors(checkpoint)
    _check(tensors, checkpoint)
    return tensors


def _tensors(checkpoint: Checkpoint) -> Mapping[str, SourceTensor]:
    if checkpoint.gguf is not None:
        from engine.checkpoint.gguf import open_gguf

        path = checkpoint.gguf
        packed = open_gguf(path).packed(checkpoint.config)
        return {t.name: _of_gguf(path, t) for t in packed}
    from engine.checkpoint.source import weights

    entries: dict[str, TensorEntry] = {}
    for entry in chain.from_iterable(map(read_header, weights(checkpoint, "bfloat16"))):
        if (name := listed_name(checkpoint.config, entry.name)) is None:
            continue
        if name in entries:
            other = entries[name].path
            raise CheckpointError(f"{entry.path}: tensor {entry.name} is in {other} already")
        entries[name] = entry
    experts = {t.spec.hf_name: _of_expert(t) for t in expert_tensors(entries, checkpoint.config)}
    return {name: _of_entry(entry) for name, entry in entries.items()} | experts


def _of_expert(t: ExpertTensor) -> SourceTensor:
    """It is small enough to be read whole, whatever rows are asked for."""
    kind = "" if t.rows is None else t.type_name.lower()
    values = partial(_some, t.values)
    return SourceTensor(t.path, t.spec.shape, t.type_name, kind, t.rows or _no_rows, values)


def _some(read: Callable[[], Floats], first: int, end: int) -> Floats:
    return read()[first:end]


def _no_rows() -> Bytes:
    return np.empty((0, 0), np.uint8)


def _of_gguf(path: Path, t: PackedTensor) -> SourceTensor:
    kind = t.kind.name.lower()
    return SourceTensor(
        path,
        t.shape,
        t.kind.name,
        kind if kind in KINDS else "",
        t.rows,
        lambda first, end: t.values(first, end, f"{path}: {t.gguf_name}"),
    )


def _of_entry(entry: TensorEntry) -> SourceTensor:
    def values(first: int, end: int) -> Floats:
        if entry.dtype == "U8":
            raise CheckpointError(
                f"{entry.path}: tensor {entry.name} has type U8, expected plain floats"
            )
        rows = entry_array(entry).reshape(-1, entry.shape[-1])[first:end]
        return floats(rows, entry.dtype)

    return SourceTensor(entry.path, entry.shape, entry.dtype, "", _no_rows, values)


def _check(source: Mapping[str, SourceTensor], checkpoint: Checkpoint) -> None:
    """The checkpoint has the tensors of its architecture and no others. Raises CheckpointError."""
    config = checkpoint.config
    shapes = {spec.hf_name: spec.shape for spec in architecture_of(config).tensors(config)}
    missing = [name for name in shapes if name not in source]
    if missing:
        where = checkpoint.gguf or checkpoint.folder
        raise CheckpointError(f"{where}: tensor {missing[0]} is missing ({len(missing)} in all)")
    for name, tensor in source.items():
        if name not in shapes:
            raise CheckpointError(
                f"{tensor.path}: unexpected tensor {name} in a {config.architecture}"
            )
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"{tensor.path}: tensor {name} has shape {list(tensor.shape)}, "
                f"expected {list(shapes[name])}"
            )


def in_order(tensor: SourceTensor, part: TensorSpec) -> SourceTensor:
    """The tensor with its rows as the list has them; they move within a head alone."""
    if (order := part.row_order()) is None:
        return tensor
    rows, size = np.array(order), part.shape[0] // part.num_heads

    def values(first: int, end: int) -> Floats:
        start = first // size * size
        heads = tensor.values(start, -(-end // size) * size)
        return np.take(heads, rows[first:end] - start, axis=0)

    return replace(tensor, rows=lambda: tensor.rows()[rows], values=values)


def vector(tensor: SourceTensor, part: TensorSpec) -> Floats:
    """What is not packed, in fp32: a vector, or a matrix that is kept exact."""
    rows, order = part.shape[0] if part.exact else 1, part.row_order()
    values = tensor.values(0, rows) + np.float32(part.offset)
    return values if order is None else values[:, order]
