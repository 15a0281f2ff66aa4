"""Tensors of a file in Hugging Face layout that hold those of all experts of a layer.

    [experts, outputs, inputs], or [experts, inputs, outputs] where gate and up alternate
    <name>_blocks [experts, outputs, inputs / 32, 16] and <name>_scales [experts, outputs,
    inputs / 32]: MXFP4, two values a byte, the first one below

An MXFP4 value is a number of four bits times a power of two, so bfloat16 holds it exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engine.models.architecture import FusedPart, TensorSpec, architecture_of
from engine.models.config import ModelConfig

BLOCKS, SCALES = "_blocks", "_scales"
_FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_VALUES = np.concatenate([_FP4, -_FP4])
_BIAS = 127  # of the exponents


def fused_tensors(config: ModelConfig) -> dict[str, list[TensorSpec]]:
    """The tensors of the list that a tensor of a file may hold, by its name."""
    found: dict[str, list[TensorSpec]] = {}
    for spec in architecture_of(config).tensors(config):
        if spec.fused is not None:
            found.setdefault(spec.fused.hf_name, []).append(spec)
    return found


def cut(tensor: Any, part: FusedPart, *, quantised: bool = False) -> Any:
    """One tensor [outputs, ...] of those of all experts; numpy's or torch's.

    quantised: blocks or scales, whose outputs come first in any case.
    """
    one = tensor[part.expert]
    first, stop, step = part.outputs
    return (one.T if part.transposed and not quantised else one)[first:stop:step]


def dequantise_mxfp4(
    blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]
) -> npt.NDArray[np.float32]:
    """Blocks [N, inputs / 32, 16] and scales [N, inputs / 32] -> fp32 [N, inputs]."""
    values = np.stack((_VALUES[blocks & 15], _VALUES[blocks >> 4]), -1)
    exponents = scales.astype(np.int32)[..., None, None] - _BIAS
    out: npt.NDArray[np.float32] = np.ldexp(values, exponents)
    return out.reshape(len(blocks), -1)
