"""Files of the cache: written whole or not at all, and read only if their digest is right.

    part (temporary name) -> fsync -> rename -> fsync of the folder

A sealed file is JSON that carries a digest of the rest of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.base.errors import CheckpointError

_SEAL = "sha256"


@dataclass(frozen=True, slots=True)
class FileState:
    """Attributes that the file system changes whenever a file's bytes change."""

    path: Path  # without symbolic links
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int  # only the kernel sets it: a program can restore mtime, but not this
    named: Path = field(compare=False)  # as the caller gave it: a link may point elsewhere later

    @classmethod
    def of(cls, path: Path) -> FileState:
        """The present state. Raises CheckpointError where there is no such file."""
        try:
            found = path.resolve()
            stat = found.stat()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        return cls(found, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, path)

    def fields(self) -> list[str | int]:
        """The values as JSON keeps them."""
        return [str(self.path), self.inode, self.size_bytes, self.mtime_ns, self.ctime_ns]

    def check(self) -> None:
        """Raise CheckpointError if the file has changed, or its path leads to another file now."""
        if FileState.of(self.named) != self:
            raise CheckpointError(f"{self.named}: the file changed while it was read; start again")


def write_file(path: Path, content: bytes) -> None:
    """Write a small file, whole or not at all, and durable on return. Raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with its own digest. Raises OSError."""
    text = json.dumps({**content, _SEAL: _seal(content)}, indent=1, ensure_ascii=False)
    write_file(path, text.encode() + b"\n")


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The object as it was written; None where there is none, or it is not what was written."""
    try:
        content = json.loads(path.read_bytes())
        return content if content.pop(_SEAL) == _seal(content) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _seal(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
