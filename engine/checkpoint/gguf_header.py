"""Reads what stands before the weights of a GGUF file: metadata, names and types of the tensors.

So a file that cannot be served is refused before gigabytes are fetched, hashed or converted.

    | "GGUF" | version u32 | tensors u64 | pairs u64 |
    | (key, type u32, value) ... | (name, shape, type u32, offset u64) ... | data, aligned |

Arrays, which are most of it, are skipped unless they are asked for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from engine.base.errors import CheckpointError
from engine.checkpoint.gguf_tokenizer import check_tokenizer
from engine.models.architecture import Architecture, architectures
from engine.models.gguf_metadata import GGUFMetadata

ROPE_TYPES = ("none", "linear", "yarn")
# type -> struct format; 8 is a string, 9 an array
_SCALARS = {i: f"<{c}" for i, c in enumerate("BbHhIif?")} | {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAGIC = b"GGUF"
_TOKENS = "tokenizer.ggml.tokens"
_MAX_PAIRS, _MAX_KEY, _MAX_STRING = 1 << 16, 1 << 16, 1 << 26
_MAX_TENSORS, _MAX_DIMENSIONS, _MAX_SIZE = 1 << 20, 4, 1 << 50
_ALIGNMENT = 32  # of the data, unless a key has another
# Types of tensors that are read: (name, values of a block, bytes of a block) by ggml's number.
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor."""

    name: str
    shape: tuple[int, ...]  # as the format has it: the fastest dimension first
    kind: int  # ggml's number of its type
    offset: int  # of its data, in bytes from the start of the file

    @property
    def num_bytes(self) -> int:
        """Size of its data. Its type is one of TYPES."""
        _, num_values, num_bytes = TYPES[self.kind]
        return math.prod(self.shape) // num_values * num_bytes


@dataclass(frozen=True, slots=True)
class Header:
    """Metadata by key, and the tensors."""

    path: Path
    scalars: Mapping[str, Any]  # and strings
    lengths: Mapping[str, int]  # of arrays
    arrays: Mapping[str, list[Any]]  # empty unless they were asked for
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        """The format's own name of the architecture."""
        return str(self.scalars.get("general.architecture"))


def gguf_architectures() -> tuple[str, ...]:
    """The format's names of the architectures that are read."""
    return tuple(dict.fromkeys(a.gguf for a in architectures() if a.gguf))


def gguf_architecture(meta: GGUFMetadata) -> Architecture:
    """The architecture of a file that names one of them; `llama` has two."""
    named = [a for a in architectures() if a.gguf == meta.architecture]
    has_experts = meta.get("expert_count", 0) > 0
    return next((a for a in named if a.gguf_experts == has_experts), named[0])


def check_header(header: Header, tensors: Iterable[TensorInfo]) -> None:
    """Raise CheckpointError if the file cannot be served; `tensors` are those of all parts."""
    path, arch = header.path, header.architecture
    if f"{arch}.attention.kv_lora_rank" in header.scalars:
        raise CheckpointError(
            f"{path}: architecture {arch!r} is not supported; its latent KV (multi-head latent "
            "attention, MLA) is not built"
        )
    if arch not in (known := gguf_architectures()):
        raise CheckpointError(
            f"{path}: architecture {arch!r} is not supported; known are {', '.join(known)} "
            "(docs/models.md: how to add one)"
        )
    for tensor in tensors:
        if tensor.kind not in TYPES:
            names = ", ".join(name for name, _, _ in TYPES.values())
            raise CheckpointError(
                f"{path}: tensor {tensor.name} has type {tensor.kind}, which is not read; "
                f"known are {names}"
            )
        _check_rows(header, tensor)
    key = f"{arch}.rope.scaling.type"
    if (kind := header.scalars.get(key, "none")) not in ROPE_TYPES:
        raise CheckpointError(
            f"{path}: {key} {kind!r} is not supported; known are {', '.join(ROPE_TYPES)}"
        )
    check_tokenizer(header.scalars, header.lengths.get(_TOKENS, 0), path)


def _check_rows(header: Header, tensor: TensorInfo) -> None:
    """The vocabulary fits the embedding, which may have further rows."""
    num_tokens = header.lengths.get(_TOKENS, 0)
    if tensor.name == "token_embd.weight" and tensor.shape[-1] < num_tokens:
        raise CheckpointError(
            f"{header.path}: the vocabulary has {num_tokens} tokens and the embedding "
            f"{tensor.shape[-1]} rows; they are not of one model"
        )


def read_header(path: Path, *, arrays: bool = False) -> Header:
    """Read what stands before the data, which is there in full.

    Raises CheckpointError in one sentence that names the file.
    """
    try:
        with path.open("rb") as file:
            header = parse_header(path, file, arrays=arrays)
        ends = [t.offset + t.num_bytes for t in header.tensors if t.kind in TYPES]
        if max(ends, default=0) > path.stat().st_size:
            raise damaged(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (struct.error, ValueError, EOFError, MemoryError):
        raise damaged(path) from None
    return header


def is_gguf(path: Path) -> bool:
    """Whether a file begins as GGUF files do. Raises OSError."""
    with path.open("rb") as file:
        return file.read(4) == _MAGIC


def damaged(path: Path) -> CheckpointError:
    """The error for a file that ends too early, or whose metadata make no sense."""
    size = path.stat().st_size
    return CheckpointError(f"{path}: truncated or damaged GGUF file ({size} bytes); fetch it again")


def parse_header(path: Path, file: BinaryIO, *, arrays: bool = False) -> Header:
    """Read from a stream, which `path` names in errors.

    Raises CheckpointError, or what a reader of a damaged file meets: struct.error, ValueError,
    EOFError, OSError.
    """
    magic = file.read(4)
    if magic != _MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file (it starts with {magic!r})")
    version = _number(file, "<I")
    if version & 0xFFFF == 0:
        raise CheckpointError(f"{path}: written in the other byte order; convert it first")
    if version == 1:
        raise CheckpointError(f"{path}: GGUF version 1 is not supported; convert it to version 3")
    num_tensors = _bounded(_number(file, "<Q"), _MAX_TENSORS)
    scalars: dict[str, Any] = {}
    found: dict[str, list[Any]] = {}
    lengths: dict[str, int] = {}
    num_pairs = _bounded(_number(file, "<Q"), _MAX_PAIRS)
    for _ in range(num_pairs):
        key = _string(file, _MAX_KEY).decode()
        kind = _number(file, "<I")
        if kind == _ARRAY and arrays:
            found[key] = _array(file)
            lengths[key] = len(found[key])
        elif kind == _ARRAY:
            lengths[key] = _skip_array(file)
        elif kind == _STRING:
            scalars[key] = _string(file, _MAX_STRING).decode("utf-8", "replace")
        elif kind in _SCALARS:
            scalars[key] = _number(file, _SCALARS[kind])
        else:
            raise ValueError(kind)
    tensors = [_tensor(file) for _ in range(num_tensors)]
    alignment = _bounded(int(scalars.get("general.alignment", _ALIGNMENT)), 1 << 20)
    data = -(-file.tell() // max(alignment, 1)) * alignment
    placed = tuple(replace(tensor, offset=data + tensor.offset) for tensor in tensors)
    return Header(path, scalars, lengths, found, placed)


def _tensor(file: BinaryIO) -> TensorInfo:
    """A tensor whose offset counts from the start of the data."""
    name = _string(file, _MAX_KEY).decode()
    num_dimensions = _bounded(_number(file, "<I"), _MAX_DIMENSIONS)
    shape = tuple(_number(file, "<Q") for _ in range(num_dimensions))
    _bounded(math.prod(shape), _MAX_SIZE)
    return TensorInfo(name, shape, _number(file, "<I"), _bounded(_number(file, "<Q"), _MAX_SIZE))


def _array(file: BinaryIO) -> list[Any]:
    kind, length = _number(file, "<I"), _bounded(_number(file, "<Q"), 1 << 26)
    if kind in _SCALARS:
        form = f"<{length}{_SCALARS[kind][1]}"
        return list(struct.unpack(form, file.read(struct.calcsize(form))))
    if kind != _STRING:
        raise ValueError(kind)  # arrays of arrays are not used
    return [_string(file, _MAX_STRING).decode() for _ in range(length)]


def _skip_array(file: BinaryIO) -> int:
    """Skip an array; returns its length."""
    kind, length = _number(file, "<I"), _number(file, "<Q")
    if kind in _SCALARS:
        file.seek(length * struct.calcsize(_SCALARS[kind]), 1)
    elif kind == _STRING:
        for _ in range(_bounded(length, 1 << 26)):
            file.seek(_bounded(_number(file, "<Q"), _MAX_STRING), 1)
    else:
        raise ValueError(kind)  # arrays of arrays are not used
    return int(length)


def _string(file: BinaryIO, limit: int) -> bytes:
    length = _bounded(_number(file, "<Q"), limit)
    data = file.read(length)
    if len(data) != length:
        raise EOFError
    return data


def _number(file: BinaryIO, form: str) -> Any:
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _bounded(value: int, limit: int) -> int:
    if value > limit:
        raise ValueError(value)
    return value
