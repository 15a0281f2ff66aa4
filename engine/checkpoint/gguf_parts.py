"""The files of a GGUF model: one, or the parts that llama.cpp's tool splits it into.

    model-00001-of-00003.gguf    all metadata, and some tensors
    model-00002-of-00003.gguf    further tensors; split.no, split.count and split.tensors.count

The parts lie beside each other, and any of them names the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.base.errors import CheckpointError
from engine.checkpoint.gguf_header import Header, TensorInfo, check_header, read_header

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_KEYS = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True, slots=True)
class GGUFParts:
    """The headers of a model's files, the one with the metadata first."""

    headers: tuple[Header, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, in order."""
        return tuple(header.path for header in self.headers)

    def tensors(self) -> Iterator[TensorInfo]:
        """The tensors of all files."""
        for header in self.headers:
            yield from header.tensors

    def check(self) -> None:
        """Raise CheckpointError if the model cannot be served."""
        check_header(self.headers[0], self.tensors())


def find_parts(path: Path, *, arrays: bool = False) -> GGUFParts:
    """The files of the model that `path` is, or is a part of; `arrays` of the first one's metadata.

    Raises CheckpointError that names a part which is missing or does not belong to the others.
    """
    named = read_header(path)
    number, count, _ = split_of(named)
    if count <= 1:
        return GGUFParts((read_header(path, arrays=True) if arrays else named,))
    match = PART.search(path.name)
    if match is None or (int(match[1]), int(match[2])) != (number, count):
        raise CheckpointError(
            f"{path}: part {number} of {count} of a split GGUF file by its metadata; its name must "
            f"end with -{number:05}-of-{count:05}.gguf, so that the other parts are found"
        )
    paths = part_paths(path, count)
    for part in paths:
        if not part.exists():
            raise CheckpointError(
                f"{part}: this part of a split GGUF file is missing ({count} in all)"
            )
    headers = tuple(
        read_header(part, arrays=arrays and part == paths[0]) if part != path or arrays else named
        for part in paths
    )
    _check_split(headers)
    return GGUFParts(headers)


def part_paths(path: Path, count: int) -> list[Path]:
    """The names of all parts, by the name of one."""
    stem = PART.sub("", path.name)
    return [path.with_name(f"{stem}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]


def model_stem(path: Path) -> str:
    """The name of the file without the number of the part and the ending."""
    return PART.sub("", path.name).removesuffix(".gguf")


def split_of(header: Header) -> tuple[int, int, int]:
    """(number of the part from 1, parts, tensors in all parts); one part where it is not split."""
    values = [header.scalars.get(key, 0) for key in _KEYS]
    if any(isinstance(value, bool) or not isinstance(value, int) for value in values):
        raise CheckpointError(f"{header.path}: {', '.join(_KEYS)} must be whole numbers")
    number, count, num_tensors = values
    match = PART.search(header.path.name)
    if count <= 1 and match and int(match[2]) > 1:
        raise CheckpointError(
            f"{header.path}: named as part {int(match[1])} of {int(match[2])} of a split GGUF "
            "file, but split.count is missing"
        )
    return number + 1, count, num_tensors


def _check_split(headers: tuple[Header, ...]) -> None:
    """The parts are those of one model. Raises CheckpointError."""
    expected = split_of(headers[0])[1:]
    for number, header in enumerate(headers, 1):
        found = split_of(header)
        if found != (number, *expected):
            keys = ", ".join(_KEYS)
            raise CheckpointError(
                f"{header.path}: not a part of the same file as {headers[0].path.name} "
                f"({keys} are {[found[0] - 1, *found[1:]]}, "
                f"expected {[number - 1, *expected]})"
            )
    num_tensors = sum(len(header.tensors) for header in headers)
    if num_tensors != expected[1]:
        raise CheckpointError(
            f"{headers[0].path}: the {len(headers)} parts have {num_tensors} tensors, "
            f"split.tensors.count is {expected[1]}"
        )
