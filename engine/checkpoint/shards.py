"""Safetensors files: their headers, a check that they are complete, and a writer.

    | 8 bytes: header length | JSON header: name -> dtype, shape, [begin, end) | data |

The library's writer needs every tensor in memory at once, too much for a converted 70B model; this
one holds one piece at a time. The library reads tensors; this module reads headers, so that a
truncated file is refused before gigabytes are mapped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.base.errors import CheckpointError
from engine.checkpoint.jsonfile import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("F64", "I64", "U64"), 8),
}
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".h5", ".msgpack")
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    name: str
    dtype: str  # as the header spells it: F32, BF16, ...
    shape: tuple[int, ...]
    path: Path
    offset: int  # bytes from the start of the file
    num_bytes: int


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one safetensors file, which is checked to be whole. Raises CheckpointError."""
    header, base, size = _read(path)
    try:
        entries = [_entry(path, base, *kv) for kv in header.items() if kv[0] != "__metadata__"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from None
    end = max((e.offset + e.num_bytes for e in entries), default=base)
    if end > size:
        raise CheckpointError(
            f"{path}: truncated, {size} bytes where its header promises {end}; fetch it again"
        )
    place = base
    for entry in sorted(entries, key=lambda e: (e.offset, e.num_bytes)):
        if entry.offset != place:
            raise CheckpointError(f"{path}: bytes {place} to {entry.offset} are not one tensor's")
        place += entry.num_bytes
    if place != size:
        raise CheckpointError(f"{path}: bytes {place} to {size} belong to no tensor")
    return entries


def read_metadata(path: Path) -> dict[str, object]:
    """The metadata in the header. Raises CheckpointError."""
    found = _read(path)[0].get("__metadata__") or {}
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: not a safetensors file (its metadata is no object)")
    return found


def _read(path: Path) -> tuple[dict[str, Any], int, int]:
    """(header, where the data begins, size of the file), in bytes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: truncated or not a safetensors file ({size} bytes)")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise CheckpointError(f"{path}: not a safetensors file (its header is no JSON)") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file (its header is no object)")
    return header, 8 + length, size


def _entry(path: Path, base: int, name: str, info: dict[str, object]) -> TensorEntry:
    shape = tuple(int(n) for n in info["shape"])  # type: ignore[attr-defined]
    begin, end = (int(n) for n in info["data_offsets"])  # type: ignore[attr-defined]
    dtype = str(info["dtype"])
    if (
        dtype not in DTYPE_BYTES
        or end - begin != math.prod(shape) * DTYPE_BYTES[dtype]
        or begin < 0
    ):
        raise ValueError(f"tensor {name!r} has an impossible size")
    return TensorEntry(name, dtype, shape, path, base + begin, end - begin)


def find_shards(folder: Path) -> list[Path]:
    """The weight files of a folder in Hugging Face layout, in order, each checked to be whole.

    Raises CheckpointError naming the file that is missing, truncated or lacks a tensor that the
    index names.
    """
    index = folder / INDEX
    if not index.exists():
        single = folder / SINGLE
        if not single.exists():
            found = sorted(p.name for p in folder.iterdir() if p.suffix in _OTHER_FORMATS)
            others = f"{', '.join(found)} is not read" if found else "other formats are not read"
            if files := sorted(p.name for p in folder.glob("*.gguf")):
                others = f"of its GGUF files name one: {', '.join(files)}"
            raise CheckpointError(f"{folder}: no weights, neither {SINGLE} nor {INDEX} ({others})")
        read_header(single)
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing")
    shards = []
    for name in sorted(set(weight_map.values())):
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path}: this shard is named in {INDEX} and missing")
        promised = {tensor for tensor, shard in weight_map.items() if shard == name}
        if lacking := promised - {e.name for e in read_header(path)}:
            raise CheckpointError(
                f"{path}: tensor {min(lacking)!r} is named in {INDEX} and missing"
            )
        shards.append(path)
    return shards


def write_shard(
    path: Path,
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    pieces: Iterable[bytes | memoryview],
) -> None:
    """Write one safetensors file into a folder that has no final name yet.

    `tensors` are (name, dtype, shape) in the order of the data; `pieces` are their bytes one after
    another, cut anywhere.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        written = sum(file.write(piece) for piece in pieces)
    if written != end:
        raise AssertionError(f"{path}: {written} bytes written where the header has {end}")
