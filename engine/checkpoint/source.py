"""Finds the model that a user names, as a folder in Hugging Face layout.

The name is one of packaged.py, a GGUF file or a part of one, a folder, or a hub id (hub.py).

A GGUF file is converted once and kept:

    <cache>/models/<name>-<digest of the file>-<version>/    config.json, tokenizer.json, ...
    <cache>/weights/<fingerprint>-<dtype>-<version>/         model.safetensors, on demand

Both are entries of the cache (kept.py): whole or absent, checked at each use, made by one process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from engine.base.errors import CheckpointError
from engine.checkpoint.added_tokens import TOKENIZER
from engine.checkpoint.config import read_config
from engine.checkpoint.digest import file_digests, joined_digest
from engine.checkpoint.files import FileState
from engine.checkpoint.fingerprint import gguf_fingerprint, shards_fingerprint
from engine.checkpoint.foreign import (
    check_vocabulary,
    refuse_draft_heads,
    refuse_gguf_folder,
    refuse_other_kinds,
)
from engine.checkpoint.gguf_header import is_gguf, read_header
from engine.checkpoint.gguf_parts import find_parts, model_stem
from engine.checkpoint.hub import GGUF_ID, HUB_ID, fetch_folder, fetch_gguf
from engine.checkpoint.kept import kept
from engine.checkpoint.packaged import PACKAGED, packaged_file
from engine.checkpoint.shards import SINGLE, find_shards
from engine.models.config import ModelConfig

_CONVERTER = 4  # part of an entry's name: raise it when a conversion would come out differently
_NAMES = f"names known here are {', '.join(PACKAGED)}"
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on this machine's disk."""

    folder: Path  # Hugging Face layout; for a GGUF file the converted folder
    name: str  # the name it is served under unless the user gives another
    config: ModelConfig
    fingerprint: str  # of the source's weights; "" if `resolve` was called without weights
    gguf: Path | None = None  # the original file, or the first part of it, with packed tensors
    sources: tuple[FileState, ...] = ()  # the files of the fingerprint, as they were

    def for_length(self, max_model_len: int) -> Checkpoint:
        """The model for texts of up to `max_model_len` tokens; 0: of its whole context."""
        return replace(self, config=self.config.for_length(max_model_len))

    def check_unchanged(self) -> None:
        """After weights were read: raise CheckpointError where they are not the fingerprint's."""
        for source in self.sources:
            source.check()


def resolve(model: str, *, weights: bool = True) -> Checkpoint:
    """Find, fetch or convert `model`; progress goes to standard error.

    `weights=False` is for a process that never computes: a folder need not hold weights, the hub's
    are not fetched. Raises CheckpointError in one sentence that names the model or file.
    """
    if model in PACKAGED:
        return _from_gguf(packaged_file(model), model)
    if not model:
        raise CheckpointError(
            "the model's name is empty; expected a hub id, a folder or a .gguf file"
        )
    path = Path(model).expanduser()
    if path.is_dir():
        return _from_folder(path, path.resolve().name, weights)
    if path.exists():
        return _from_file(path)
    if model.endswith(".gguf"):
        raise CheckpointError(f"{path}: no such file")
    if match := GGUF_ID.fullmatch(model):
        path = fetch_gguf(match[1], match[2])
        return _from_gguf(path, model_stem(path))
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{model}: no such folder, and no hub id (owner/name) either; {_NAMES}"
        )
    known = "" if "/" in model else f"; {_NAMES}"
    folder = fetch_folder(model, weights, (_read_folder, _require_tokenizer), known)
    return _from_folder(folder, model.rsplit("/", 1)[-1], weights)


def weights(checkpoint: Checkpoint, dtype: str, *, read: bool = True) -> list[Path]:
    """The safetensors files to load for `dtype`, each checked to be whole.

    A converted GGUF gives one file of exactly that dtype, written on the first call; a Hugging Face
    folder gives its own files in the dtype they were published in. `read` as `kept` has it. Raises
    CheckpointError naming the missing or truncated file.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
    if checkpoint.gguf is None:
        return find_shards(checkpoint.folder)
    gguf = checkpoint.gguf

    def make(folder: Path) -> None:
        from engine.checkpoint.gguf import open_gguf
        from engine.checkpoint.gguf_weights import write_weights

        packed = open_gguf(gguf).packed(checkpoint.config)
        write_weights(folder / SINGLE, packed, dtype, source=gguf)
        checkpoint.check_unchanged()

    name = f"{checkpoint.fingerprint}-{dtype}-{_CONVERTER}"
    return [kept("weights", name, make, read=read) / SINGLE]


def _from_folder(folder: Path, name: str, with_weights: bool) -> Checkpoint:
    refuse_gguf_folder(folder, {path.name for path in folder.iterdir()})
    config = _read_folder(folder)
    _require_tokenizer(folder)
    check_vocabulary(folder, config)
    if not with_weights:
        return Checkpoint(folder, name, config, "")
    shards = find_shards(folder)
    refuse_draft_heads(folder, shards)
    fingerprint, states = shards_fingerprint(config, shards)
    return Checkpoint(folder, name, config, fingerprint, sources=states)


def _read_folder(folder: Path) -> ModelConfig:
    """The configuration. Raises CheckpointError where the folder holds no model to serve."""
    refuse_other_kinds(folder, {path.name for path in folder.iterdir()})
    refuse_draft_heads(folder, ())
    return read_config(folder)


def _require_tokenizer(folder: Path) -> None:
    if not (path := folder / TOKENIZER).exists():
        raise CheckpointError(f"{path}: this file is missing (tokenizer.model is not read)")


def _from_file(path: Path) -> Checkpoint:
    """A GGUF file by any name, such as the blobs of Ollama."""
    if path.suffix == ".gguf":
        return _from_gguf(path, model_stem(path))
    try:
        if not is_gguf(path):
            raise CheckpointError(
                f"{path}: neither a folder in Hugging Face layout nor a GGUF file, which begins "
                "with the letters GGUF"
            )
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    name = read_header(path).scalars.get("general.name")
    named = "-".join(name.split()) if isinstance(name, str) else ""
    return _from_gguf(path, named or path.name)


def _from_gguf(path: Path, name: str) -> Checkpoint:
    parts = find_parts(path)
    parts.check()  # refuse what can be refused before all of it is hashed
    digested = [file_digests(part) for part in parts.paths]
    states = tuple(found.state for found in digested)
    digest = joined_digest([found.digests[0] for found in digested])

    def make(folder: Path) -> None:
        from engine.checkpoint.gguf import convert

        convert(parts.paths[0], folder)
        for state in states:
            state.check()

    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:80]
    folder = kept("models", f"{safe}-{digest[:32]}-{_CONVERTER}", make)
    config = read_config(folder)
    fingerprint = gguf_fingerprint(config, digest)
    return Checkpoint(folder, name, config, fingerprint, parts.paths[0], states)
