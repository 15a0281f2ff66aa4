"""GGUF-packed weights beside the dense ones: the same values, rounded to bfloat16 by the kernel.

A packing is used as it is in the file, with its own scales; only the order of bytes is changed so
that a kernel can unpack two blocks at once. That is done once and kept beside the converted model.
Numeric profile: the file's values rounded to bfloat16, bfloat16 activations, fp32 sums, in both
packings; they differ only in the order of sums.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.checkpoint.gguf import open_gguf
from engine.checkpoint.gguf_weights import PackedTensor
from engine.checkpoint.source import Checkpoint
from engine.model.layers import PackedLayer
from engine.model.llama import LlamaModel
from engine.native import Kernels, kernels

_BLOCK = 32
_FILE = "packed-1.safetensors"  # the number goes up with the order of bytes
_Bytes = npt.NDArray[np.uint8]
_Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class GGUFMatrix:
    """One weight, or several joined along their outputs."""

    kind: str  # "q4_1" or "q8_0"
    packed: torch.Tensor  # uint8, see kernels.c
    scales: torch.Tensor  # fp16 as int16, [num_outputs, ...]
    library: Kernels

    def product(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x [M, K] bfloat16 times the weight transposed: [M, N] of `dtype`."""
        out = torch.empty(x.shape[0], self.scales.shape[0], dtype=dtype)
        self.library.linear(self.kind, self.packed, self.scales, x.contiguous(), out)
        return out


def q4_1(rows: _Bytes) -> tuple[_Bytes, npt.NDArray[np.int16]]:
    """(packed [N, K / 64, 32], scales [N, K / 32, 2]) of the file's rows [N, K / 32 * 20]."""
    blocks = rows.reshape(rows.shape[0], -1, 20)
    scales = np.ascontiguousarray(blocks[:, :, :4]).view(np.int16)
    nibbles = np.concatenate([blocks[:, :, 4:] & 15, blocks[:, :, 4:] >> 4], axis=2)
    pairs = nibbles.reshape(rows.shape[0], -1, 2, _BLOCK)
    return np.ascontiguousarray(pairs[:, :, 0] | (pairs[:, :, 1] << 4)), scales


def q8_0(rows: _Bytes) -> tuple[_Bytes, npt.NDArray[np.int16]]:
    """(packed [N, K / 32, 32], scales [N, K / 32, 1]) of the file's rows [N, K / 32 * 34]."""
    blocks = rows.reshape(rows.shape[0], -1, 34)
    scales = np.ascontiguousarray(blocks[:, :, :2]).view(np.int16)
    return np.ascontiguousarray(blocks[:, :, 2:]), scales


# How a kind is reordered, and which widths its kernel takes.
_KINDS: dict[str, tuple[Any, int]] = {"q4_1": (q4_1, 2 * _BLOCK), "q8_0": (q8_0, _BLOCK)}


def repack(parts: Sequence[PackedTensor]) -> tuple[str, torch.Tensor, torch.Tensor] | None:
    """(kind, packed, scales) of the parts joined along their outputs; None without a kernel."""
    kinds, widths = {part.kind.name.lower() for part in parts}, {part.shape[-1] for part in parts}
    kind, width = min(kinds), min(widths)
    reorder, multiple = _KINDS.get(kind, (None, 1))
    if len(kinds) > 1 or reorder is None or width % multiple:
        return None
    packed, scales = zip(*(reorder(part.rows()) for part in parts), strict=True)
    return kind, torch.from_numpy(np.concatenate(packed)), torch.from_numpy(np.concatenate(scales))


def add_packed(model: LlamaModel, checkpoint: Checkpoint) -> LlamaModel:
    """The model with packed weights for steps of few rows, as far as there are kernels for them.

    The model itself where there is no GGUF file, no kernel, or another precision than bfloat16.
    """
    library = kernels()
    usable = model.device.type == "cpu" and model.dtype is torch.bfloat16
    widest = max(model.config.hidden_size, model.config.intermediate_size)
    if checkpoint.gguf is None or library is None or not usable or widest > library.max_columns:
        return model
    path = checkpoint.folder / _FILE
    tensors = _read(path)
    if tensors is None:
        tensors = _make(checkpoint.gguf, model)
        _write(path, tensors)
    matrices = _matrices(tensors, library)
    layers = []
    for index, layer in enumerate(model.weights.layers):
        parts = [matrices.get(f"{index}.{name}") for name in ("qkv", "out", "gate_up", "down")]
        biases = (layer.qkv_bias, layer.out_bias, layer.gate_up_bias, layer.down_bias)
        qkv, out, gate_up, down = parts
        if qkv and out and gate_up and down and all(bias is None for bias in biases):
            layer = dataclasses.replace(layer, packed=PackedLayer(qkv, out, gate_up, down))
        layers.append(layer)
    weights = dataclasses.replace(
        model.weights, layers=tuple(layers), packed_head=matrices.get("head")
    )
    return LlamaModel(model.config, weights)


def _matrices(tensors: _Tensors, library: Kernels) -> dict[str, GGUFMatrix]:
    """{"3.qkv": ..., "head": ...} of the kept tensors."""
    out = {}
    for name in tensors:
        place, kind, part = name.rsplit(".", 2)
        if part == "packed":
            scales = tensors[f"{place}.{kind}.scales"]
            out[place] = GGUFMatrix(kind, tensors[name], scales, library)
    return out


def _groups(num_layers: int) -> Iterator[tuple[str, list[str]]]:
    """(our name, the Hugging Face names that it joins) of every matrix but the head."""
    for index in range(num_layers):
        at = f"model.layers.{index}"
        yield f"{index}.qkv", [f"{at}.self_attn.{x}_proj.weight" for x in "qkv"]
        yield f"{index}.out", [f"{at}.self_attn.o_proj.weight"]
        yield f"{index}.gate_up", [f"{at}.mlp.{x}_proj.weight" for x in ("gate", "up")]
        yield f"{index}.down", [f"{at}.mlp.down_proj.weight"]


def _make(path: Path, model: LlamaModel) -> _Tensors:
    """{"3.qkv.q4_1.packed": ..., "3.qkv.q4_1.scales": ..., ..., "head.q8_0.packed": ...}."""
    source = {tensor.name: tensor for tensor in open_gguf(path).packed(model.config)}
    head = "lm_head.weight" if "lm_head.weight" in source else "model.embed_tokens.weight"
    tensors: _Tensors = {}
    for name, parts in [*_groups(model.config.num_layers), ("head", [head])]:
        if made := repack([source[part] for part in parts]):
            kind, packed, scales = made
            tensors[f"{name}.{kind}.packed"] = packed
            tensors[f"{name}.{kind}.scales"] = scales
    return tensors


def _read(path: Path) -> _Tensors | None:
    """The kept tensors, memory-mapped; None where there are none that can be read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.offset_keys()}
    except (OSError, SafetensorError):
        return None


def _write(path: Path, tensors: _Tensors) -> None:
    """Keep them, by one rename; a folder that cannot be written is no error."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        save_file(tensors, part)
        part.rename(path)
    except (OSError, SafetensorError):
        part.unlink(missing_ok=True)
