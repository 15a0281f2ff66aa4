"""An entry of the cache is served as it was written, or made again: damage is never served."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog
from prometheus_client import CollectorRegistry

from engine.base.errors import CheckpointError
from engine.checkpoint import digest, files, kept, lock, packed
from engine.checkpoint.packed import packed_file
from engine.checkpoint.source import Checkpoint, resolve, weights
from engine.telemetry.cache import show_damaged
from tests.support import tiny_gguf

Damage = Callable[[Path, random.Random], None]


def num_damaged(kind: str) -> float | None:
    registry = CollectorRegistry()
    show_damaged(registry)
    return registry.get_sample_value("diptych_cache_damaged_total", {"kind": kind})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny_gguf.tiny(tmp_path / "m.gguf")
    return str(tmp_path / "m.gguf")


def everything(model: str) -> tuple[Checkpoint, dict[str, bytes]]:
    """Use all kinds of entries; the bytes of every file that was used."""
    found = resolve(model)
    used = [*found.folder.iterdir(), *weights(found, "float32")]
    return found, {path.name: path.read_bytes() for path in used}


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zero_a_page(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data)) // 4096 * 4096
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def lengthen(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def another(path: Path, rng: random.Random) -> None:
    (path.parent / "added_tokens.json").write_text('{"<x>": 3}')


def a_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Damage] = [
    *(flip,) * 10,
    *(zero_a_page,) * 2,
    *(cut,) * 2,
    lengthen,
    lambda path, rng: path.write_bytes(b""),
    lambda path, rng: path.unlink(),
    a_folder,
    another,
    lambda path, rng: shutil.rmtree(path.parent),
]


def test_damage_of_any_file_is_made_good(model: str, cache: Path) -> None:
    rng = random.Random(3)
    found, content = everything(model)
    names = [path.relative_to(cache) for path in cache.rglob("*.*") if path.is_file()]
    names = [name for name in names if name.suffix != ".lock"]
    assert {name.parts[0] for name in names} == {"digests", "models", "weights"}
    assert sum(name.name == "diptych.json" for name in names) == 2
    for name in names:
        for damage in DAMAGES:
            if name.parts[0] == "digests" and damage in (a_folder, another):
                continue  # an additional note is one of another file
            damage(cache / name, rng)
            again, repaired = everything(model)
            assert again == found, name
            assert repaired == content, name


def test_damage_is_logged_and_counted(model: str, cache: Path) -> None:
    found, _ = everything(model)
    before = num_damaged("models")
    config = found.folder / "config.json"
    config.write_text(config.read_text().replace("silu", "gelu"))
    with structlog.testing.capture_logs() as lines:
        everything(model)
        everything(model)
    reasons = [line["reason"] for line in lines if "damaged" in line["event"]]
    assert reasons == ["config.json has other bytes"]
    assert num_damaged("models") == before + 1
    (note,) = (cache / "digests").glob("*.json")
    note.write_text("{}")
    before = num_damaged("digests")
    everything(model)
    assert num_damaged("digests") == before + 1


def test_the_packed_file_of_another_model_is_not_served(tmp_path: Path) -> None:
    """Two models of one shape: each folder is whole, in the wrong place."""
    tiny_gguf.tiny(tmp_path / "a.gguf")
    tiny_gguf.tiny(tmp_path / "b.gguf", seed=5)
    (one, _), (two, _) = everything(str(tmp_path / "a.gguf")), everything(str(tmp_path / "b.gguf"))
    pairs = [
        (weights(x, "float32")[0].parent for x in (one, two)),
        (x.folder for x in (one, two)),
    ]
    before = [weights(x, "float32")[0].read_bytes() for x in (one, two)]
    assert before[0] != before[1]
    for first, second in pairs:
        aside = tmp_path / "aside"
        first.rename(aside)
        second.rename(first)
        aside.rename(second)
    assert everything(str(tmp_path / "a.gguf"))[0] == one
    assert [weights(x, "float32")[0].read_bytes() for x in (one, two)] == before
    # Single files too.
    first, second = (weights(x, "float32")[0] for x in (one, two))
    shutil.copy(second, first)
    assert weights(one, "float32")[0].read_bytes() == before[0]


USE = """
import sys, hashlib
from engine.checkpoint.source import resolve, weights
c = resolve(sys.argv[1])
print(c.fingerprint, hashlib.sha256(weights(c, "float32")[0].read_bytes()).hexdigest())
"""


def test_several_processes_repair_the_same_damage(model: str, cache: Path) -> None:
    found, content = everything(model)
    for name in ("models", "weights"):
        for path in (cache / name).rglob("*.*"):
            if path.is_file() and path.suffix != ".lock":
                path.write_bytes(b"")
    command = [sys.executable, "-c", USE, model]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    out = [process.communicate(timeout=120)[0] for process in running]  # log lines, then its output
    (line,) = {text.splitlines()[-1] for text in out}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert line.split()[0] == found.fingerprint
    assert everything(model) == (found, content)


def unwritable(monkeypatch: pytest.MonkeyPatch, cache: Path, code: int) -> None:
    """Every write below `cache` fails."""

    def refuse(path: Path) -> None:
        if Path(path).is_relative_to(cache):
            raise OSError(code, os.strerror(code), str(path))

    mkdir, opened = Path.mkdir, os.open

    def no_mkdir(self: Path, *args: object, **how: object) -> None:
        if not self.exists():
            refuse(self)
        mkdir(self, *args, **how)  # type: ignore[arg-type]

    def no_open(path: str, flags: int, *args: int, **how: int) -> int:
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            refuse(Path(path))
        return opened(path, flags, *args, **how)

    monkeypatch.setattr(Path, "mkdir", no_mkdir)
    monkeypatch.setattr(lock.os, "open", no_open)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_without_a_writable_cache_the_model_is_served(
    model: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    unwritable(monkeypatch, cache, code)
    with structlog.testing.capture_logs() as lines:
        found, _ = everything(model)
    assert not cache.exists()
    temporary = tmp_path / "tmp" / f"diptych-{os.getuid()}"
    assert found.folder.is_relative_to(temporary)
    assert temporary.stat().st_mode & 0o777 == 0o700
    warned = [line for line in lines if line["event"] == "the cache cannot be written"]
    assert os.strerror(code) in warned[0]["reason"]
    monkeypatch.setattr(digest, "_hash", None)  # nothing is hashed or made again
    monkeypatch.setattr(kept, "_build", None)
    assert everything(model)[0] == found


def test_a_read_only_cache_is_used_and_its_damage_made_good_elsewhere(
    model: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, content = everything(model)
    unwritable(monkeypatch, cache, errno.EROFS)
    assert everything(model) == (found, content)
    flip(found.folder / "config.json", random.Random(1))
    again, repaired = everything(model)
    assert again.folder.is_relative_to(tmp_path / "tmp")
    assert again.fingerprint == found.fingerprint
    assert repaired.keys() == content.keys()
    assert repaired["config.json"] == content["config.json"]


def test_a_cache_of_another_user_is_as_good_as_none(
    model: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folders may not even be entered."""
    found, content = everything(model)
    unwritable(monkeypatch, cache, errno.EACCES)
    stat = Path.stat

    def no_stat(self: Path, **how: bool) -> os.stat_result:
        if self.is_relative_to(cache):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return stat(self, **how)

    monkeypatch.setattr(Path, "stat", no_stat)
    again, repaired = everything(model)
    assert again.folder.is_relative_to(tmp_path / "tmp")
    assert (again.fingerprint, repaired) == (found.fingerprint, content)


@pytest.mark.parametrize("times", [1, 2])
def test_a_cache_that_is_deleted_while_it_is_written_is_written_again(
    model: str, cache: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    sync, remaining = files.sync, [times]

    def deleting(path: Path) -> None:
        if remaining[0] and "models" in path.parts:
            remaining[0] -= 1
            shutil.rmtree(cache)
        sync(path)

    monkeypatch.setattr(kept, "sync", deleting)
    if times == 1:
        assert everything(model)[0].folder.is_relative_to(cache)
    else:
        with pytest.raises(CheckpointError, match=r"No such file.*DIPTYCH_CACHE_DIR"):
            everything(model)


def test_a_temporary_folder_of_another_user_is_refused(
    model: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unwritable(monkeypatch, cache, errno.EROFS)
    temporary = tmp_path / "tmp" / f"diptych-{os.getuid()}"
    temporary.mkdir()
    temporary.chmod(0o777)
    with pytest.raises(CheckpointError, match=r"not a folder of this user alone.*DIPTYCH_CACHE"):
        resolve(model)


def test_a_disk_that_fills_up_leaves_nothing_behind(
    model: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = files.sync

    def full(path: Path) -> None:
        if path.is_relative_to(cache) and "models" in path.parts:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    monkeypatch.setattr(kept, "sync", full)
    monkeypatch.setattr(files, "sync", full)
    found, _ = everything(model)
    assert found.folder.is_relative_to(tmp_path / "tmp")
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_a_source_that_changes_while_it_is_converted_is_refused(
    model: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.checkpoint import gguf_weights

    found = resolve(model)

    def changing(write: Callable[..., None]) -> Callable[..., None]:
        def changed(*args: object, **how: object) -> None:
            write(*args, **how)
            flip(Path(model), random.Random(2))

        return changed

    monkeypatch.setattr(gguf_weights, "write_weights", changing(gguf_weights.write_weights))
    with pytest.raises(CheckpointError, match=r"m\.gguf: the file changed while it was read"):
        weights(found, "float32")
    found = resolve(model)
    monkeypatch.setattr(packed, "_write", changing(lambda path, *_: path.write_bytes(b"x")))
    with pytest.raises(CheckpointError, match=r"m\.gguf: the file changed while it was read"):
        packed_file(found, "auto")
    assert [path.suffix for path in (cache / "packed").iterdir()] == [".lock"]


# As the first version with manifests wrote it, byte for byte.
FIRST_MANIFEST = """{
 "version": 1,
 "entry": "packed/x-1",
 "files": {
  "a": [
   5,
   "9fffb1edbf08b505c10dde883606848ec33a919a6b40081da04e3b60b7a98eaa"
  ]
 },
 "sha256": "f67680ebeed897328126927d5990279c49339cd0bb8e8f2f1cfc0a33df4acd34"
}
"""


def test_an_entry_of_the_first_version_is_read(cache: Path) -> None:
    folder = cache / "packed" / "x-1"
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(b"bytes")
    (folder / kept.MANIFEST).write_text(FIRST_MANIFEST)
    made: list[Path] = []
    assert kept.kept("packed", "x-1", made.append) == folder
    assert made == []


def test_an_entry_of_another_version_is_made_again_and_is_no_damage(cache: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "a").write_bytes(b"new")

    folder, before = kept.kept("packed", "x-1", make), num_damaged("packed")
    (folder / "a").write_bytes(b"old")
    manifest = json.loads((folder / kept.MANIFEST).read_bytes()) | {"version": 0}
    del manifest["sha256"]
    files.write_sealed(folder / kept.MANIFEST, manifest)
    with structlog.testing.capture_logs() as lines:
        assert (kept.kept("packed", "x-1", make) / "a").read_bytes() == b"new"
    assert [(line["log_level"], line["version"]) for line in lines] == [("info", 0)]
    assert num_damaged("packed") == before


def test_a_process_that_uses_no_bytes_reads_none(
    model: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes entries that are missing, empty or cut; their readers find other damage."""
    found, _ = everything(model)
    path = weights(found, "float32")[0]
    content = path.read_bytes()
    os.truncate(path, 100)
    assert weights(found, "float32", read=False)[0].read_bytes() == content
    flip(path, random.Random(4))
    with monkeypatch.context() as patched:
        patched.setattr(kept, "whole_file", None)
        assert weights(found, "float32", read=False) == [path]
    assert weights(found, "float32")[0].read_bytes() == content


def test_a_link_that_is_turned_while_the_model_is_loaded(model: str, tmp_path: Path) -> None:
    """A link to the file, and to its folder: no entry is of one model and named after another."""
    tiny_gguf.tiny(tmp_path / "other.gguf", seed=5)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    os.link(model, tmp_path / "a" / "m.gguf")
    os.link(tmp_path / "other.gguf", tmp_path / "b" / "m.gguf")
    (tmp_path / "file.gguf").symlink_to("a/m.gguf")
    (tmp_path / "now").symlink_to("a")
    for name, link, to in (("file.gguf",) * 2 + ("b/m.gguf",), ("now/m.gguf", "now", "b")):
        found = resolve(str(tmp_path / name))
        (tmp_path / link).unlink()
        (tmp_path / link).symlink_to(to)
        with pytest.raises(CheckpointError, match=r"m.*\.gguf|file\.gguf: the file changed"):
            weights(found, "float32")


def test_a_sealed_file_is_read_as_written(tmp_path: Path) -> None:
    content = {"a": [1, "é"], "b": None}
    files.write_sealed(tmp_path / "x.json", content)
    assert files.read_sealed(tmp_path / "x.json") == content
    data = (tmp_path / "x.json").read_bytes()
    for at in range(len(data)):
        for bit in range(8):
            (tmp_path / "x.json").write_bytes(
                data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]
            )
            assert files.read_sealed(tmp_path / "x.json") in (None, content)
    for text in ("", "[]", "1", "null", "{}", "[" * 100_000, '{"sha256": 1}'):
        (tmp_path / "x.json").write_text(text)
        assert files.read_sealed(tmp_path / "x.json") is None
