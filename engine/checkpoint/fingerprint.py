"""What the weights are, in one short digest, without reading all of them.

Two workers may exchange KV blocks only if they hold the same weights. A 140 GB checkpoint cannot be
hashed at every start, so each tensor gives its name, shape, dtype and up to 16 KiB of evenly
sampled bytes. The digest is of the *source* (the GGUF's packed tensors, or the shards as they were
published), never of a conversion, so it is the same whatever precision a worker computes in; it
does not depend on how tensors are spread over files. It guards against mistakes, not against
forgery.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from engine.checkpoint.added_tokens import TOKENIZER, merged_tokenizer
from engine.checkpoint.config import ModelConfig
from engine.checkpoint.shards import TensorEntry
from engine.errors import CheckpointError

_NUM_SAMPLES = 16
_SAMPLE_BYTES = 1024


def sample_ranges(num_bytes: int) -> list[tuple[int, int]]:
    """[begin, end) byte ranges to look at: everything if it is small, else first to last, evenly
    spread.
    """
    if num_bytes <= _NUM_SAMPLES * _SAMPLE_BYTES:
        return [(0, num_bytes)]
    last = num_bytes - _SAMPLE_BYTES
    starts = (last * i // (_NUM_SAMPLES - 1) for i in range(_NUM_SAMPLES))
    return [(start, start + _SAMPLE_BYTES) for start in starts]


def weights_fingerprint(
    config: ModelConfig,
    tensors: Iterable[tuple[str, str, tuple[int, ...], int, Callable[[int, int], bytes]]],
) -> str:
    """Hex digest of (name, dtype, shape, num_bytes, read(begin, end)) tensors in any order, and of
    `config`.
    """
    h = hashlib.blake2b(digest_size=16, person=b"diptych-weights")
    _add(h, repr(config).encode())
    for name, dtype, shape, num_bytes, read in sorted(tensors, key=lambda t: t[0]):
        _add(h, f"{name} {dtype} {shape}".encode())
        for begin, end in sample_ranges(num_bytes):
            _add(h, read(begin, end))
    return h.hexdigest()


def shards_fingerprint(config: ModelConfig, entries: Iterable[TensorEntry]) -> str:
    """`weights_fingerprint` of safetensors files. Raises CheckpointError on unreadable ones."""
    files: dict[Path, int] = {}

    def reader(entry: TensorEntry) -> Callable[[int, int], bytes]:
        def read(begin: int, end: int) -> bytes:
            if entry.path not in files:
                files[entry.path] = os.open(entry.path, os.O_RDONLY)
            data = os.pread(files[entry.path], end - begin, entry.offset + begin)
            if len(data) != end - begin:
                raise CheckpointError(f"{entry.path}: truncated inside tensor {entry.name!r}")
            return data

        return read

    try:
        tensors = [(e.name, e.dtype, e.shape, e.num_bytes, reader(e)) for e in entries]
        return weights_fingerprint(config, tensors)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}") from None
    finally:
        for fd in files.values():
            os.close(fd)


def tokenizer_digest(folder: Path) -> str:
    """Hex digest of the tokenizer: equal digests read and write the same token ids.

    Raises CheckpointError.
    """
    h = hashlib.blake2b(digest_size=16, person=b"diptych-tokens")
    try:
        _add(h, merged_tokenizer(folder).encode())
    except OSError as error:
        raise CheckpointError(f"{folder / TOKENIZER}: {error.strerror}") from None
    return h.hexdigest()


def _add(h: hashlib.blake2b, field: bytes) -> None:
    """Length-prefixed, so that fields cannot run into each other."""
    h.update(len(field).to_bytes(8, "little"))
    h.update(field)
