"""Reads the scalars of a GGUF file's metadata in milliseconds.

So a file that cannot be served is refused before gigabytes are hashed, mapped or converted.

    | "GGUF" | version u32 | tensors u64 | pairs u64 | (key, type u32, value) ... |

Arrays are skipped; `gguf` reads them when a file is converted.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.base.errors import CheckpointError
from engine.checkpoint.gguf_tokenizer import check_tokenizer
from engine.models.architecture import Architecture, architectures

ROPE_TYPES = ("none", "linear", "yarn")
# type -> struct format; 8 is a string, 9 an array
_SCALARS = {i: f"<{c}" for i, c in enumerate("BbHhIif?")} | {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_PAIRS, _MAX_KEY, _MAX_STRING = 1 << 16, 1 << 16, 1 << 26
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True, slots=True)
class Header:
    """Scalars and strings by key; of an array its length."""

    path: Path
    scalars: Mapping[str, Any]
    lengths: Mapping[str, int]

    @property
    def architecture(self) -> str:
        """The format's own name of the architecture."""
        return str(self.scalars.get("general.architecture"))


def gguf_architectures() -> dict[str, Architecture]:
    """Each architecture that is read, by the format's name."""
    return {a.gguf: a for a in architectures() if a.gguf}


def check_gguf(path: Path) -> None:
    """Raise CheckpointError if the metadata shows that the file cannot be served."""
    header = read_header(path)
    _refuse_split(header)
    arch = header.architecture
    if arch not in (known := gguf_architectures()):
        raise CheckpointError(
            f"{path}: architecture {arch!r} is not supported; known are {', '.join(known)}"
        )
    key = f"{arch}.rope.scaling.type"
    if (kind := header.scalars.get(key, "none")) not in ROPE_TYPES:
        raise CheckpointError(
            f"{path}: {key} {kind!r} is not supported; known are {', '.join(ROPE_TYPES)}"
        )
    check_tokenizer(header.scalars, header.lengths.get("tokenizer.ggml.tokens", 0), path)


def _refuse_split(header: Header) -> None:
    """A part of a split model has the metadata but only some of the tensors."""
    count, part = (header.scalars.get(f"split.{key}", 0) for key in ("count", "no"))
    if not isinstance(count, int) or not isinstance(part, int):
        raise CheckpointError(f"{header.path}: split.count and split.no must be whole numbers")
    part += 1
    if count <= 1 and (match := _PART.search(header.path.name)):
        part, count = int(match[1]), int(match[2])
    if count > 1:
        whole = _PART.sub("", header.path.name).removesuffix(".gguf") + ".gguf"
        first = _PART.sub(f"-00001-of-{count:05}.gguf", header.path.name)
        raise CheckpointError(
            f"{header.path}: part {part} of {count} of a split GGUF file; split files are not read "
            f"yet: merge them first (llama-gguf-split --merge {first} {whole}) and name the result"
        )


def read_header(path: Path) -> Header:
    """Read the metadata. Raises CheckpointError in one sentence that names the file."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise CheckpointError(f"{path}: not a GGUF file (it starts with {magic!r})")
            return _pairs(path, file)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (struct.error, ValueError, EOFError):
        raise damaged(path) from None


def damaged(path: Path) -> CheckpointError:
    """The error for a file that ends too early, or whose metadata make no sense."""
    size = path.stat().st_size
    return CheckpointError(f"{path}: truncated or damaged GGUF file ({size} bytes); fetch it again")


def _pairs(path: Path, file: BinaryIO) -> Header:
    version = _number(file, "<I")
    if version & 0xFFFF == 0:
        raise CheckpointError(f"{path}: written in the other byte order; convert it first")
    if version == 1:
        raise CheckpointError(f"{path}: GGUF version 1 is not supported; convert it to version 3")
    _number(file, "<Q")  # tensors
    scalars: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    num_pairs = _bounded(_number(file, "<Q"), _MAX_PAIRS)
    for _ in range(num_pairs):
        key = _string(file, _MAX_KEY).decode()
        kind = _number(file, "<I")
        if kind == _ARRAY:
            lengths[key] = _skip_array(file)
        elif kind == _STRING:
            scalars[key] = _string(file, _MAX_STRING).decode("utf-8", "replace")
        elif kind in _SCALARS:
            scalars[key] = _number(file, _SCALARS[kind])
        else:
            raise ValueError(kind)
    return Header(path, scalars, lengths)


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
