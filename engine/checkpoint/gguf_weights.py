"""The tensors of a GGUF file under their Hugging Face names, and their dequantised copies as
safetensors.

llama.cpp's conversion of Llama models reorders the rows of q and k, so that rotary pairs are
neighbours:

    Hugging Face, a head of size d   0 1 2 .. d/2-1 | d/2 .. d-1
    GGUF                             0 d/2 1 d/2+1 2 d/2+2 ..

Rows are quantised one by one, so the order is restored on the packed bytes, before anything is
dequantised. Qwen2 files keep the original order. The GGUF layout is that of the ggml project's
specification (gguf.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.base.errors import CheckpointError
from engine.checkpoint.shards import write_shard
from engine.telemetry.progress import Bar, bar

SAFETENSORS_DTYPE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_PIECE_BYTES = 64 << 20  # of dequantised fp32 at a time

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_FREQS = "rope_freqs.weight"  # folded into config.json, not a weight


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor as the file holds it, rows in Hugging Face order."""

    name: str  # Hugging Face name
    gguf_name: str
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # of the dequantised tensor
    data: npt.NDArray[Any]  # rows of values (F32, F16) or of packed bytes; memory-mapped
    num_permuted_heads: int  # 0: the rows are as they were

    def rows(self) -> npt.NDArray[Any]:
        """[num_rows, ...]: packed rows in Hugging Face order; a vector is one row."""
        data = self.data
        if self.num_permuted_heads:
            data = unpermute(data, self.num_permuted_heads)
        return data if len(self.shape) > 1 else data.reshape(1, -1)


def unpermute(rows: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Undo llama.cpp's row order of q and k: axis 0 holds num_heads x (head_dim / 2) x 2 rows."""
    head_dim = rows.shape[0] // num_heads
    pairs = rows.reshape(num_heads, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def packed_tensors(
    tensors: list[Any], *, permuted: bool, num_heads: int, num_kv_heads: int, path: Path
) -> list[PackedTensor]:
    """Name the tensors of a GGUFReader; CheckpointError for one that no supported model has."""
    out = []
    for t in tensors:
        if t.name == ROPE_FREQS:
            continue
        heads = 0
        name = _GLOBAL_NAMES.get(t.name)
        if (match := _LAYER.fullmatch(t.name)) and match[2] in _LAYER_NAMES:
            name = f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
            if permuted:
                heads = {"attn_q": num_heads, "attn_k": num_kv_heads}.get(match[2], 0)
        if name is None:
            raise CheckpointError(f"{path}: tensor {t.name!r} belongs to no supported architecture")
        shape = tuple(int(n) for n in reversed(t.shape))
        out.append(PackedTensor(name, t.name, t.tensor_type, shape, t.data, heads))
    return out


def write_weights(
    out: Path, tensors: list[PackedTensor], dtype: str, *, source: Path, progress: bool
) -> None:
    """Dequantise into one safetensors file of `dtype` (float32, bfloat16, float16; round to nearest
    even).
    """
    kind = SAFETENSORS_DTYPE[dtype]
    shown = bar(
        total=sum(int(np.prod(t.shape)) for t in tensors),
        desc=f"Converting {source.name} to {dtype}",
        unit=" weights",
        unit_scale=True,
        show=progress,
    )
    with shown:
        pieces = (piece for t in tensors for piece in _pieces(t, dtype, source, shown))
        write_shard(out, [(t.name, kind, t.shape) for t in tensors], pieces)


def _pieces(tensor: PackedTensor, dtype: str, source: Path, shown: Bar) -> Iterator[memoryview]:
    """The tensor's bytes in `dtype`, a bounded number of rows at a time."""
    rows = tensor.rows()
    num_columns = tensor.shape[-1]
    step = max(1, _PIECE_BYTES // (4 * num_columns))
    for start in range(0, rows.shape[0], step):
        values = dequantize(
            rows[start : start + step], tensor.kind, f"{source}: {tensor.gguf_name}"
        )
        yield cast(values, dtype, f"{source}: {tensor.gguf_name}").data.cast("B")
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
