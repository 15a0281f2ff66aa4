"""Tensors of a file in Hugging Face layout that hold those of all experts of a layer.

    [experts, outputs, inputs], or [experts, inputs, outputs] where gate and up alternate
    <name>_blocks [experts, outputs, inputs / 32, 16] and <name>_scales [experts, outputs,
    inputs / 32]: MXFP4, two values a byte, the first one below

An MXFP4 value is a number of four bits times a power of two, so bfloat16 holds it exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.base.errors import CheckpointError
from engine.checkpoint.shards import TensorEntry
from engine.models.architecture import FusedPart, TensorSpec, architecture_of
from engine.models.config import ModelConfig

BLOCKS, SCALES = "_blocks", "_scales"
_FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_VALUES = np.concatenate([_FP4, -_FP4])
_BIAS = 127  # of the exponents
_DTYPES = {"BF16": np.uint16, "F32": np.float32, "F16": np.float16, "U8": np.uint8}
_Floats = npt.NDArray[np.float32]


def fused_tensors(config: ModelConfig) -> dict[str, list[tuple[TensorSpec, FusedPart]]]:
    """The tensors of the list that a tensor of a file may hold, by its name."""
    found: dict[str, list[tuple[TensorSpec, FusedPart]]] = {}
    for spec in architecture_of(config).tensors(config):
        if spec.fused is not None:
            found.setdefault(spec.fused.hf_name, []).append((spec, spec.fused))
    return found


def cut(tensor: Any, part: FusedPart, *, quantised: bool = False) -> Any:
    """One tensor [outputs, ...] of those of all experts; numpy's or torch's.

    quantised: blocks or scales, whose outputs come first in any case.
    Raises CheckpointError where there is no such expert.
    """
    if part.expert >= tensor.shape[0]:
        raise CheckpointError(f"tensor {part.hf_name} has no expert {part.expert}")
    one = tensor[part.expert]
    first, stop, step = part.outputs
    return (one.T if part.transposed and not quantised else one)[first:stop:step]


def dequantise_mxfp4(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> _Floats:
    """Blocks [N, inputs / 32, 16] and scales [N, inputs / 32] -> fp32 [N, inputs]."""
    values = np.stack((_VALUES[blocks & 15], _VALUES[blocks >> 4]), -1)
    exponents = scales.astype(np.int32)[..., None, None] - _BIAS
    out: _Floats = np.ldexp(values, exponents)
    return out.reshape(len(blocks), -1)


def gguf_mxfp4(
    blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]
) -> npt.NDArray[np.uint8]:
    """Rows [N, inputs / 32 * 17] of a GGUF tensor: the first half of a block below the second."""
    values = np.stack((blocks & 15, blocks >> 4), -1).reshape(*scales.shape, 32)
    halves = values[..., :16] | (values[..., 16:] << 4)
    return np.concatenate((scales[..., None], halves), -1).reshape(len(blocks), -1)


# -- without torch ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """A tensor of the list that lies in one of all experts."""

    spec: TensorSpec
    path: Path
    type_name: str  # BF16, MXFP4
    values: Callable[[], _Floats]  # rows in fp32; a vector is one row
    rows: Callable[[], npt.NDArray[np.uint8]] | None  # as a GGUF file has them, of MXFP4


def expert_tensors(entries: dict[str, TensorEntry], config: ModelConfig) -> Iterator[ExpertTensor]:
    """Those tensors; the ones that hold them are taken out of `entries`."""
    for name, parts in fused_tensors(config).items():
        whole, blocks, scales = (entries.pop(name + x, None) for x in ("", BLOCKS, SCALES))
        for spec, part in parts:
            if whole is not None:
                read = partial(_plain, whole, spec, part)
                yield ExpertTensor(spec, whole.path, whole.dtype, read, None)
            elif blocks is not None and scales is not None:
                halves = partial(_halves, blocks, scales, spec, part)
                values = partial(_of_both, dequantise_mxfp4, halves)
                rows = partial(_of_both, gguf_mxfp4, halves)
                yield ExpertTensor(spec, blocks.path, "MXFP4", values, rows)


def _plain(whole: TensorEntry, spec: TensorSpec, part: FusedPart) -> _Floats:
    values = floats(cut(entry_array(whole), part), whole.dtype)
    _check(values.shape, whole, spec)
    return values.reshape(-1, values.shape[-1])


def _halves(
    blocks: TensorEntry, scales: TensorEntry, spec: TensorSpec, part: FusedPart
) -> list[npt.NDArray[np.uint8]]:
    """Blocks and scales of one expert."""
    halves = [cut(entry_array(half), part, quantised=True) for half in (blocks, scales)]
    for half in halves:
        _check((half.shape[0], 32 * half.shape[1]), blocks, spec)
    return halves


def _of_both(
    function: Callable[..., Any], halves: Callable[[], list[npt.NDArray[np.uint8]]]
) -> Any:
    return function(*halves())


def _check(shape: tuple[int, ...], entry: TensorEntry, spec: TensorSpec) -> None:
    if shape != spec.shape:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name} has shape {list(entry.shape)}, "
            f"expected {list(spec.shape)} of each expert"
        )


def entry_array(entry: TensorEntry) -> npt.NDArray[Any]:
    """A tensor of a file, memory-mapped; bfloat16 as uint16. Raises CheckpointError."""
    if entry.dtype not in _DTYPES:
        raise CheckpointError(
            f"{entry.path}: tensor {entry.name} has type {entry.dtype}, expected plain floats"
        )
    raw = np.memmap(entry.path, np.uint8, "r", entry.offset, (entry.num_bytes,))
    return raw.view(_DTYPES[entry.dtype]).reshape(entry.shape)


def floats(values: npt.NDArray[Any], dtype: str) -> _Floats:
    """fp32 of an array of a file, whose header names the type."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
