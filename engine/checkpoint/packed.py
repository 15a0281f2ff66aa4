"""Weights in the layout of our CPU kernels (engine/native/matmul.h), made once and kept.

A weight [N, K] is stored by groups of sixteen rows, a group by records of 32 columns: their scales,
then their values, two neighbouring columns of each row beside each other:

    record   | d of 16 rows | (m of 16 rows) | columns 0 1 of rows 0..15 | columns 2 3 of ... |

GGUF's Q4_0, Q4_1 and Q8_0 keep their own integers and scales: only their order changes. What has
another type, and every weight under `--weights bf16`, is rounded to bfloat16. `--weights int8` and
`int4` quantise again: a numeric profile of its own.

One safetensors file a (checkpoint, choice), in the cache folder; torch is not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from engine.checkpoint.config import ModelConfig
from engine.checkpoint.gguf_weights import cast, dequantize
from engine.checkpoint.lock import exclusive
from engine.checkpoint.shards import TensorEntry, read_entries, read_header, write_shard
from engine.checkpoint.source import Checkpoint
from engine.config import cache_dir
from engine.errors import CheckpointError

GROUP, BLOCK = 16, 32
_VERSION = 1  # part of the file's name: raise it with the layout
_WAIT_S = 1800.0
_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Matrix:
    """One weight, or several joined along their outputs, as it lies in the file."""

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
    """A tensor of the checkpoint: in its own packing, if there is a kernel for it, or as fp32."""

    shape: tuple[int, ...]
    kind: str  # q4_0, q4_1, q8_0; "" for any other
    rows: Callable[[], _Bytes]
    values: Callable[[], _Floats]


def _tensors(checkpoint: Checkpoint) -> Mapping[str, _Tensor]:
    if checkpoint.gguf is not None:
        from engine.checkpoint.gguf import open_gguf

        packed = open_gguf(checkpoint.gguf).packed(checkpoint.config)
        return {t.name: _of_gguf(t) for t in packed}
    from engine.checkpoint.source import weights

    entries = read_entries(weights(checkpoint, "bfloat16"))
    return {entry.name: _of_entry(entry) for entry in entries}


def _of_gguf(t: Any) -> _Tensor:
    kind = t.kind.name.lower()
    return _Tensor(
        t.shape,
        kind if kind in ("q4_0", "q4_1", "q8_0") else "",
        lambda: t.rows(),
        lambda: dequantize(t.rows(), t.kind, t.gguf_name).reshape(t.shape),
    )


def _of_entry(entry: TensorEntry) -> _Tensor:
    def values() -> _Floats:
        raw = np.fromfile(entry.path, np.uint8, entry.num_bytes, offset=entry.offset)
        if entry.dtype == "BF16":
            wide = raw.view(np.uint16).astype(np.uint32) << 16
            return wide.view(np.float32).reshape(entry.shape)
        kinds = {"F32": np.float32, "F16": np.float16}
        if entry.dtype not in kinds:
            raise CheckpointError(f"{entry.path}: tensor {entry.name} has type {entry.dtype}")
        return raw.view(kinds[entry.dtype]).astype(np.float32).reshape(entry.shape)

    return _Tensor(entry.shape, "", lambda: np.empty((0, 0), np.uint8), values)


# -- the file --------------------------------------------------------------------------------------


def packable(config: ModelConfig) -> bool:
    """Whether the kernels take these widths."""
    inner = config.num_heads * config.head_dim
    widths = (config.hidden_size, config.intermediate_size, inner, config.head_dim)
    few = config.num_heads // config.num_kv_heads <= 96 and config.head_dim <= 256
    return few and all(width % BLOCK == 0 for width in widths)


def packed_file(checkpoint: Checkpoint, choice: str, *, progress: bool = True) -> Path:
    """The file for `choice` (auto, bf16, int8 or int4), made on the first call.

    Raises CheckpointError.
    """
    name = f"{checkpoint.fingerprint}-{choice}-{_VERSION}.safetensors"
    path = cache_dir() / "packed" / name
    if not _is_whole(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with exclusive(path.with_suffix(".lock"), _WAIT_S):
                if not _is_whole(path):
                    _write(path, checkpoint, choice, progress)
        except OSError as error:
            raise CheckpointError(f"{error.filename or path}: {error.strerror}") from None
    return path


def _is_whole(path: Path) -> bool:
    try:
        return path.exists() and bool(read_header(path))
    except CheckpointError:
        return False


def _matrices(config: ModelConfig) -> Iterator[tuple[str, list[str]]]:
    """(our name, the Hugging Face tensors that it joins)."""
    for i in range(config.num_layers):
        at = f"model.layers.{i}"
        yield f"{i}.qkv", [f"{at}.self_attn.{x}_proj" for x in "qkv"]
        yield f"{i}.out", [f"{at}.self_attn.o_proj"]
        yield f"{i}.gate_up", [f"{at}.mlp.{x}_proj" for x in ("gate", "up")]
        yield f"{i}.down", [f"{at}.mlp.down_proj"]
    yield "embedding", ["model.embed_tokens"]
    if not config.tie_word_embeddings:
        yield "head", ["lm_head"]


def _norms(config: ModelConfig) -> Iterator[tuple[str, str]]:
    for i in range(config.num_layers):
        yield f"{i}.input_norm", f"model.layers.{i}.input_layernorm.weight"
        yield f"{i}.mlp_norm", f"model.layers.{i}.post_attention_layernorm.weight"
    yield "norm", "model.norm.weight"


def _pack(parts: Sequence[_Tensor], choice: str) -> tuple[str, _Bytes]:
    """(kind, data) of tensors joined along their rows."""
    kinds = {part.kind for part in parts}
    if choice == "auto" and len(kinds) == 1 and (kind := min(kinds)):
        return kind, pack_rows(kind, np.concatenate([part.rows() for part in parts]))
    values = np.concatenate([part.values() for part in parts])
    if choice in ("int8", "int4"):
        kind = {"int8": "q8_0", "int4": "q4_1"}[choice]
        return kind, pack_rows(kind, quantise(kind, values))
    return "bf16", pack_bf16(cast(values, "bfloat16", "weights"))


def _write(path: Path, checkpoint: Checkpoint, choice: str, progress: bool) -> None:
    config, source = checkpoint.config, _tensors(checkpoint)
    header: list[tuple[str, str, tuple[int, ...]]] = []
    made: list[npt.NDArray[Any]] = []

    def tensor(name: str) -> _Tensor:
        if name not in source:
            raise CheckpointError(f"{checkpoint.folder}: tensor {name} is missing")
        return source[name]

    names = list(_matrices(config))
    off = None if progress else True
    for name, parts in tqdm(names, desc=f"Packing {checkpoint.name} ({choice})", disable=off):
        # The vocabulary is what 4 bits of a second rounding would hurt most.
        how = "int8" if choice == "int4" and "." not in name else choice
        kind, data = _pack([tensor(f"{part}.weight") for part in parts], how)
        num_rows = sum(tensor(f"{part}.weight").shape[0] for part in parts)
        header.append((f"{name}.{kind}.{num_rows}", "U8", data.shape))
        made.append(data)
        if f"{parts[0]}.bias" in source:
            bias = np.concatenate([tensor(f"{part}.bias").values() for part in parts])
            header.append((f"{name}.bias", "F32", bias.shape))
            made.append(bias)
    for name, origin in _norms(config):
        values = tensor(origin).values().reshape(-1)
        header.append((name, "F32", values.shape))
        made.append(values)
    write_shard(path, header, (np.ascontiguousarray(a).data.cast("B") for a in made))


@dataclass(frozen=True, slots=True)
class PackedWeights:
    """The tensors of a file, memory-mapped and shared by all processes that map it."""

    matrices: Mapping[str, Matrix]  # "3.qkv", ..., "embedding", "head"
    vectors: Mapping[str, _Floats]  # "3.input_norm", ..., "norm"; "3.qkv.bias" where there is one


def read_packed(path: Path, config: ModelConfig) -> PackedWeights:
    """Map the file. Raises CheckpointError."""
    mapped = np.memmap(path, np.uint8, "r")
    columns = {
        "qkv": config.hidden_size,
        "out": config.num_heads * config.head_dim,
        "gate_up": config.hidden_size,
        "down": config.intermediate_size,
        "embedding": config.hidden_size,
        "head": config.hidden_size,
    }
    matrices, vectors = {}, {}
    for entry in read_header(path):
        raw = mapped[entry.offset : entry.offset + entry.num_bytes]
        if entry.dtype == "F32":
            vectors[entry.name] = raw.view(np.float32)
            continue
        name, kind, rows = entry.name.rsplit(".", 2)
        width = columns[name.rsplit(".", 1)[-1]]
        matrices[name] = Matrix(kind, int(rows), width, raw.reshape(entry.shape))
    return PackedWeights(matrices, vectors)
