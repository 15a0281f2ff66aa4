"""The tensors of a GGUF file under their Hugging Face names, and their dequantised copies as
safetensors.

llama.cpp's conversion of Llama models reorders the rows of q and k, so that rotary pairs are
neighbours:

    Hugging Face, a head of size d   0 1 2 .. d/2-1 | d/2 .. d-1
    GGUF                             0 d/2 1 d/2+1 2 d/2+2 ..

Rows are quantised one by one, so the order is restored on the packed bytes, before they are
dequantised. The architecture's list of tensors names the tensors: files of Qwen models keep
the original order. The layout is specified in gguf.md of the ggml project.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.base.errors import CheckpointError
from engine.checkpoint.shards import write_shard
from engine.models.architecture import TensorSpec, architecture_of
from engine.models.config import ModelConfig
from engine.telemetry.progress import Bar, bar

SAFETENSORS_DTYPE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_PIECE_BYTES = 64 << 20  # of dequantised fp32 at a time

# One tensor may hold several one after another (llama.cpp's converter with --fuse-qkv and
# --fuse-gate-up-exps), of experts expert by expert.
_FUSED = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
ROPE_FREQS = "rope_freqs.weight"
ROPE_TENSORS = ("rope_freqs.", "rope_factors_")  # become keys of config.json, not weights


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor as the file holds it, rows in Hugging Face order."""

    name: str  # Hugging Face name
    gguf_name: str
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # of the dequantised tensor
    data: npt.NDArray[Any]  # rows of values (F32, F16) or of packed bytes; memory-mapped
    num_permuted_heads: int  # 0: the rows are as they were
    offset: float = 0.0  # a file in Hugging Face layout holds the values less this number
    exact: bool = False  # fp32 in every copy

    def rows(self) -> npt.NDArray[Any]:
        """[num_rows, ...]: packed rows in Hugging Face order; a vector is one row."""
        data = self.data
        if self.num_permuted_heads:
            data = unpermute(data, self.num_permuted_heads)
        return data if len(self.shape) > 1 else data.reshape(1, -1)

    def values(self, first: int, end: int, where: str) -> npt.NDArray[np.float32]:
        """fp32 of rows first .. end - 1, as a file in Hugging Face layout holds them.

        `where` names the tensor in an error.
        """
        values = dequantize(self.rows()[first:end], self.kind, where)
        return values - np.float32(self.offset) if self.offset else values


def unpermute(rows: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Undo llama.cpp's row order of q and k: axis 0 holds num_heads x (head_dim / 2) x 2 rows."""
    head_dim = rows.shape[0] // num_heads
    pairs = rows.reshape(num_heads, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def packed_tensors(tensors: list[Any], config: ModelConfig, path: Path) -> list[PackedTensor]:
    """Name the tensors of a file. Raises CheckpointError for one that is not in the
    architecture's list, is missing, or has another shape.
    """
    specs: dict[str, list[TensorSpec]] = {}
    architecture = architecture_of(config)
    for spec in architecture.tensors(config):
        specs.setdefault(spec.gguf_name, []).append(spec)
    out: list[PackedTensor] = []
    for t in tensors:
        if t.name.startswith(ROPE_TENSORS):
            continue
        if architecture.left_out(config, t.name.replace("blk.", "model.layers.")):
            continue
        lists = [specs.pop(name, None) for name in _names(t.name, specs)]
        found = [parts for parts in lists if parts is not None]
        if len(found) < len(lists):
            raise CheckpointError(f"{path}: unexpected tensor {t.name} in a {config.architecture}")
        parts = sorted((spec for some in found for spec in some), key=lambda spec: spec.expert)
        out += _parts(t, parts, path)
    missing = [spec.hf_name for parts in specs.values() for spec in parts if len(spec.shape) > 1]
    if missing:  # vectors are looked for where they are loaded
        raise CheckpointError(f"{path}: tensor {missing[0]} is missing ({len(missing)} in all)")
    return out


def _names(name: str, known: Container[str]) -> list[str]:
    """The names in the list of what a tensor of a file holds."""
    for fused, parts in _FUSED.items():
        if fused in name and name not in known:
            return [name.replace(fused, part) for part in parts]
    return [name]


def _parts(t: Any, specs: list[TensorSpec], path: Path) -> Iterator[PackedTensor]:
    """A tensor of the file: one of the list; q, k and v; or those of all experts."""
    shape, spec = tuple(int(n) for n in reversed(t.shape)), specs[0]
    rows = sum(spec.shape[0] for spec in specs)
    number = specs[-1].expert + 1  # of experts
    expected = (rows, *spec.shape[1:])
    if number:
        expected = (number, rows // number, *spec.shape[1:])
    # The format leaves out a leading 1 at times.
    if shape != expected and (1, *shape) != expected:
        raise CheckpointError(
            f"{path}: tensor {spec.hf_name} has shape {list(shape)}, expected {list(expected)}"
        )
    data, first = t.data.reshape(rows, -1) if len(spec.shape) > 1 else t.data.reshape(-1), 0
    for spec in specs:
        part = data[first : first + spec.shape[0]]
        first += spec.shape[0]
        order = (spec.permuted_heads, spec.offset, spec.exact)
        yield PackedTensor(spec.hf_name, t.name, t.tensor_type, spec.shape, part, *order)


def write_weights(out: Path, tensors: list[PackedTensor], dtype: str, *, source: Path) -> None:
    """Dequantise into one safetensors file of `dtype` (float32, bfloat16, float16; round to nearest
    even); exact tensors stay float32.
    """
    shown = bar(
        total=sum(int(np.prod(t.shape)) for t in tensors),
        desc=f"Converting {source.name} to {dtype}",
        unit=" weights",
        unit_scale=True,
    )
    with shown:
        dtypes = ["float32" if t.exact else dtype for t in tensors]
        pairs = list(zip(tensors, dtypes, strict=True))
        pieces = (piece for t, held in pairs for piece in _pieces(t, held, source, shown))
        write_shard(out, [(t.name, SAFETENSORS_DTYPE[held], t.shape) for t, held in pairs], pieces)


def _pieces(tensor: PackedTensor, dtype: str, source: Path, shown: Bar) -> Iterator[memoryview]:
    """The tensor's bytes in `dtype`, a bounded number of rows at a time."""
    num_rows = tensor.rows().shape[0]
    step = max(1, _PIECE_BYTES // (4 * tensor.shape[-1]))
    where = f"{source}: {tensor.gguf_name}"
    for start in range(0, num_rows, step):
        values = tensor.values(start, start + step, where)
        yield cast(values, dtype, where).data.cast("B")
        shown.update(values.size)


def dequantize(rows: npt.NDArray[Any], kind: Any, where: str) -> npt.NDArray[np.float32]:
    """fp32 values of packed rows, by the reference dequantisers of the `gguf` package."""
    from gguf.quants import QuantError
    from gguf.quants import dequantize as gguf_dequantize

    try:
        values = gguf_dequantize(rows, kind)
    except (NotImplementedError, QuantError):
        raise CheckpointError(f"{where}: quantisation {kind.name} is not supported") from None
    return np.ascontiguousarray(values, dtype=np.float32)


def cast(values: npt.NDArray[np.float32], dtype: str, where: str) -> npt.NDArray[Any]:
    """fp32 -> the bits of `dtype`, round to nearest even; bfloat16 comes as uint16, which numpy can
    hold.
    """
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.isinf(half).any() and not np.isinf(values).any():
            raise CheckpointError(f"{where}: values beyond float16; use bfloat16 or float32")
        return half
    bits = values.view(np.uint32)
    # Adding just under half of the last kept bit, plus that bit itself, rounds halves to even.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
