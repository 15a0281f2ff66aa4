"""Models of the Hugging Face hub: folders with safetensors, and single GGUF files.

    owner/name           config.json, then the tokenizer, then the weights
    owner/name:Q4_K_M    the repository's file of that quantisation: its header, then all of it

So a model that cannot be served is refused before gigabytes are fetched. What was fetched before
stays in the hub's own cache, and is found there without a network.
"""

from __future__ import annotations

import io
import re
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

from engine.base.errors import CheckpointError
from engine.checkpoint.added_tokens import TOKENIZER
from engine.checkpoint.foreign import refuse_other_kinds
from engine.checkpoint.gguf_header import check_header, parse_header
from engine.checkpoint.gguf_parts import PART, model_stem, part_paths

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
GGUF_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+):([\w.-]+)")
# Subfolders hold other formats of a model, but for its further chat templates.
_NOT_FETCHED = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "consolidated*"]
# The name of the quantisation at the end of a file's name.
_LABEL = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d_\d|BF16|F16|FP16|F32|MXFP4\w*))$", re.IGNORECASE
)
_NO_MODELS = ("mmproj", "imatrix")  # GGUF files for pictures, and for quantising
_READ_BYTES = 1 << 22  # of a header at a time


def fetch_folder(
    model: str,
    with_weights: bool,
    checks: tuple[Callable[[Path], object], Callable[[Path], object]],
    known: str,
) -> Path:
    """Download a model, or find it in the hub's cache.

    Args:
        model: the hub's name of it.
        with_weights: whether the weights are wanted, too.
        checks: what is called once config.json is there, and once the tokenizer is.
        known: ends the error for a name that the hub does not know.

    Raises CheckpointError.
    """
    download = partial(_download, model, ignore=_NOT_FETCHED, known=known)
    folder = download(["config.json"])
    if not (folder / "config.json").exists():
        _refuse_without_config(model, known)
    check_config, check_tokenizer = checks
    check_config(folder)
    patterns = ["*.json", "*.jinja"]
    folder = download(patterns)
    if not (folder / TOKENIZER).exists():
        _refuse_gguf(model, list_files(model, known))
    check_tokenizer(folder)
    if not with_weights:
        return folder
    folder = download([*patterns, "*.safetensors"])
    if not any(folder.glob("*.safetensors")):
        _refuse_gguf(model, list_files(model, known))
    return folder


def _refuse_without_config(model: str, known: str) -> None:
    """Raise CheckpointError that names what the repository holds."""
    files = list_files(model, known)
    _refuse_gguf(model, files)
    refuse_other_kinds(model, files)
    raise CheckpointError(f"{model}: this repository of the hub has no config.json")


def _refuse_gguf(model: str, files: Iterable[str]) -> None:
    """Raise CheckpointError where a repository has GGUF files, of which one must be named."""
    if labels := [label for label, _ in _models(files)]:
        raise CheckpointError(
            f"{model}: holds GGUF files; name one by its quantisation, {model}:{labels[0]} "
            f"(there are {', '.join(labels)})"
        )


def fetch_gguf(repository: str, wanted: str) -> Path:
    """Download the GGUF file of a quantisation, or find it in the hub's cache.

    Returns the file, or its first part. Raises CheckpointError, with what there is.
    """
    from huggingface_hub import try_to_load_from_cache

    files = choose(repository, list_files(repository), wanted)
    here = [try_to_load_from_cache(repository, name) for name in files]
    if not all(isinstance(path, str) for path in here):
        _check_remote(repository, files[0])
    return _download(repository, files) / files[0]


def choose(repository: str, files: Iterable[str], wanted: str) -> list[str]:
    """The file of a quantisation, by whatever case, or all parts of it.

    Raises CheckpointError where there is none, or several, or a part is missing.
    """
    files = list(files)
    models = _models(files)
    name = wanted.lower()
    found = [file for label, file in models if label.lower() == name]
    found = found or [file for _, file in models if Path(file).name.lower() == name]
    if not found:
        labels = ", ".join(dict.fromkeys(label for label, _ in models))
        there = f"there are {labels}" if labels else "it has no GGUF files"
        raise CheckpointError(f"{repository}: no GGUF file of quantisation {wanted!r}; {there}")
    if len(found) > 1:
        raise CheckpointError(
            f"{repository}: {len(found)} GGUF files of quantisation {wanted!r}, "
            f"{', '.join(found)}; write the name of one behind the colon, or fetch it and name "
            "the file"
        )
    (first,) = found
    match = PART.search(first)
    parts = [str(p) for p in part_paths(Path(first), int(match[2]))] if match else [first]
    if missing := [part for part in parts if part not in files]:
        raise CheckpointError(f"{repository}: {missing[0]} is missing, a part of {first}")
    return parts


def _models(files: Iterable[str]) -> list[tuple[str, str]]:
    """(quantisation, file or first part) of each model among a repository's files."""
    out = []
    for file in sorted(files):
        name, part = Path(file).name, PART.search(file)
        if not name.endswith(".gguf") or any(word in name.lower() for word in _NO_MODELS):
            continue
        if part is None or int(part[1]) == 1:
            stem = model_stem(Path(file))
            match = _LABEL.search(stem)
            out.append((match[1] if match else stem, file))
    return out


def list_files(repository: str, known: str = "") -> list[str]:
    """The names of a repository's files; without a network, of those in the hub's cache."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        return HfApi().list_repo_files(repository)
    except (OSError, ValueError, RuntimeError) as error:
        failed = _unknown(repository, error, known)
    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except (OSError, ValueError, RuntimeError):
        raise failed from None
    found = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    if not found:
        raise failed
    return found


def _check_remote(repository: str, file: str) -> None:
    """Read the header of a file that is not here. Raises CheckpointError if it is not served."""
    from huggingface_hub import HfFileSystem

    where = Path(repository) / file
    try:
        with HfFileSystem().open(str(where), "rb", block_size=_READ_BYTES) as remote:
            stream = io.BufferedReader(cast(Any, remote), _READ_BYTES)
            header = parse_header(where, cast(BinaryIO, stream))
    except (OSError, RuntimeError) as error:
        raise _unknown(repository, error, "") from None
    except (struct.error, ValueError, EOFError):
        raise CheckpointError(f"{where}: truncated or damaged GGUF file on the hub") from None
    check_header(header, header.tensors)


def _download(
    repository: str, patterns: Sequence[str], ignore: Sequence[str] = (), known: str = ""
) -> Path:
    """The folder of the hub's cache with the files that fit. Raises CheckpointError."""
    # Imported here: it would cost start-up time everywhere else.
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm as hub_tqdm

    class Bar(hub_tqdm):
        def __init__(self, *args: object, **kwargs: object) -> None:
            if not sys.stderr.isatty():
                kwargs["disable"] = True
            super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]

    try:
        folder = snapshot_download(
            repository,
            allow_patterns=list(patterns),
            ignore_patterns=list(ignore),
            tqdm_class=Bar,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise _unknown(repository, error, known) from None
    return Path(folder)


def _unknown(repository: str, error: Exception, known: str) -> CheckpointError:
    lines = str(error).strip().splitlines()
    reason = lines[0].rstrip(". ") if lines else type(error).__name__
    return CheckpointError(
        f"{repository}: neither a folder here nor a model that the hub would give ({reason}){known}"
    )
