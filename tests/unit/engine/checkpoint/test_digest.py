"""A source is identified by all of its bytes, and read once."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from engine.base.errors import CheckpointError
from engine.base.kv_layout import KVLayout, compatibility_digest
from engine.checkpoint import digest
from engine.checkpoint.digest import file_digests, hash_ranges
from engine.checkpoint.fingerprint import (
    CONFIG_FIELDS,
    EXPERT_FIELDS,
    OPTIONAL_FIELDS,
    ROPE_FIELDS,
    ROPE_LATER_FIELDS,
    config_digest,
    gguf_fingerprint,
)
from engine.checkpoint.source import resolve
from engine.models.config import ExpertSpec, ModelConfig, RopeScaling, RopeSpec
from tests.support import tiny_gguf
from tests.support.hf_folder import SHARDS, folder
from tests.support.paged import tiny_config


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sources that were read whole."""
    names: list[str] = []
    real = digest._hash

    def noted(state: Any, ranges: Any, name: str) -> Any:
        names.append(name)
        return real(state, ranges, name)

    monkeypatch.setattr(digest, "_hash", noted)
    return names


def fingerprint(model: Path) -> str:
    """The model's fingerprint, or the refusal."""
    try:
        return resolve(str(model)).fingerprint
    except CheckpointError as error:
        return error.message


def sources(tmp_path: Path) -> list[tuple[Path, Path]]:
    """(model, one of its weight files)."""
    tiny_gguf.tiny(tmp_path / "m.gguf")
    single, sharded = folder(tmp_path / "one"), folder(tmp_path / "two", shards=SHARDS)
    return [
        (tmp_path / "m.gguf", tmp_path / "m.gguf"),
        (single, single / "model.safetensors"),
        (sharded, sharded / "model-00002-of-00002.safetensors"),
    ]


def test_one_byte_anywhere_is_another_model(tmp_path: Path) -> None:
    rng = random.Random(7)
    for model, path in sources(tmp_path):
        data, seen = path.read_bytes(), {fingerprint(model)}
        places = {rng.randrange(len(data)) for _ in range(40)} | {len(data) - 1}
        for at in places:
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
            found = fingerprint(model)
            assert found not in seen, f"{path}: byte {at}"
            if len(found) == 32:
                seen.add(found)
        path.write_bytes(data)
        assert fingerprint(model) in seen


def test_a_byte_between_the_old_samples_with_an_old_time(tmp_path: Path) -> None:
    """The same size and inode, and the modification time restored."""
    (tmp_path / "m").mkdir()
    place = folder(tmp_path / "m" / "x")
    path = place / "model.safetensors"
    save_file({"a": torch.zeros(1 << 20)}, path)
    before, stat = fingerprint(place), path.stat()
    with path.open("r+b") as file:
        file.seek(2_000_123)
        file.write(b"\1")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns
    assert fingerprint(place) != before


def test_an_unchanged_source_is_read_once(tmp_path: Path, hashed: list[str]) -> None:
    for model, _ in sources(tmp_path):
        hashed.clear()
        first = fingerprint(model)
        assert len(hashed) == (2 if model.name == "two" else 1)
        assert fingerprint(model) == first
        assert len(hashed) == (2 if model.name == "two" else 1)
    (tmp_path / "link.gguf").symlink_to(tmp_path / "m.gguf")
    hashed.clear()
    fingerprint(tmp_path / "link.gguf")
    assert hashed == []
    os.utime(tmp_path / "m.gguf")
    fingerprint(tmp_path / "m.gguf")
    assert hashed == ["m.gguf"]


def test_several_that_ask_at_once_read_once(tmp_path: Path, hashed: list[str]) -> None:
    path = tmp_path / "x"
    path.write_bytes(os.urandom(20 << 20))
    found: list[digest.Digested] = []
    threads = [threading.Thread(target=lambda: found.append(file_digests(path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert hashed == ["x"]
    assert len(found) == 4
    assert len(set(found)) == 1


def test_a_file_that_changes_while_it_is_hashed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(1000))
    real = digest.hash_ranges

    def changing(*args: Any) -> list[str]:
        out = real(*args)
        with path.open("r+b") as file:
            file.write(b"\1")
        return out

    monkeypatch.setattr(digest, "hash_ranges", changing)
    with pytest.raises(CheckpointError, match="x: the file changed while it was read"):
        file_digests(path)
    monkeypatch.setattr(digest, "hash_ranges", real)
    assert file_digests(path).digests == tuple(hash_ranges(path, [(0, 1000)]))
    with pytest.raises(CheckpointError, match="truncated"):
        hash_ranges(path, [(0, 1001)])
    with pytest.raises(CheckpointError, match="nothing: No such file"):
        file_digests(tmp_path / "nothing")


def test_digests_are_trees_of_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests are as the docstring defines them, with any number of threads."""
    data = random.Random(1).randbytes(1000)
    (tmp_path / "x").write_bytes(data)
    monkeypatch.setattr(digest, "_PIECE_BYTES", 64)
    for num_cores in (1, 3):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=num_cores: range(n))
        done: list[int] = []
        found = hash_ranges(tmp_path / "x", [(10, 10), (10, 1000)], done.append)
        pieces = [hashlib.sha256(data[i : min(i + 64, 1000)]).digest() for i in range(10, 1000, 64)]
        assert found == [hashlib.sha256(x).hexdigest() for x in (b"", b"".join(pieces))]
        assert sum(done) == 990


def test_bytes_of_no_tensor_are_refused(tmp_path: Path) -> None:
    place = folder(tmp_path / "m")
    path = place / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    assert "belong to no tensor" in fingerprint(place)


def test_every_field_of_the_configuration_counts() -> None:
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    assert {*CONFIG_FIELDS, *OPTIONAL_FIELDS} == fields
    rope_fields = (*ROPE_FIELDS, *ROPE_LATER_FIELDS)
    assert set(rope_fields) == {f.name for f in dataclasses.fields(RopeScaling)}
    config = tiny_config()
    seen = {config_digest(config)}
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * (1 + 1e-15) + 1e-300}
    changed, experts = [], ExpertSpec(8, 2, 32, (1,))
    for name in (*CONFIG_FIELDS, *OPTIONAL_FIELDS):
        value = getattr(config, name)
        if name == "rope_scaling":
            for inner in rope_fields:
                part = getattr(value, inner)
                unlike = {"kind": "linear", "factors": (2.0,), "short_factors": (3.0, 4.0)}
                new = other[type(part)](part) if type(part) in other else unlike[inner]
                changed.append({name: dataclasses.replace(value, **{inner: new})})
        elif type(value) in other:
            changed.append({name: other[type(value)](value)})
        else:
            new = {
                "architecture": "X",
                "bos_token_id": 77,
                "eos_token_ids": (1, 2, 3),
                "layer_windows": (0, 5),
                "activation": "gelu_tanh",
                "other_ropes": (RopeSpec(5.0),),
                "layer_ropes": (0, 1),
                "experts": experts,
                "wrapper": "X",
            }[name]
            changed.append({name: new})
    specs = (RopeSpec(6.0), RopeSpec(5.0, RopeScaling("linear", 2.0)), RopeSpec(5.0, dim=4))
    changed += [{"other_ropes": (spec,)} for spec in specs]
    assert set(EXPERT_FIELDS) == {f.name for f in dataclasses.fields(ExpertSpec)}
    for name in EXPERT_FIELDS:
        value = getattr(experts, name)
        new = other[type(value)](value) if type(value) in other else {"layers": (2,)}.get(name, "x")
        changed.append({"experts": dataclasses.replace(experts, **{name: new})})
    assert {f.name for f in dataclasses.fields(RopeSpec)} == {"theta", "scaling", "dim"}
    for change in changed:
        found = config_digest(dataclasses.replace(config, **change))
        assert found not in seen, change
        seen.add(found)
    assert gguf_fingerprint(config, "a") != gguf_fingerprint(config, "b")


@dataclasses.dataclass(frozen=True, slots=True)
class LaterConfig(ModelConfig):
    added: int = 3


@dataclasses.dataclass(frozen=True, slots=True)
class LaterScaling(RopeScaling):
    added: str = "x"


@dataclasses.dataclass(frozen=True, slots=True)
class LaterLayout(KVLayout):
    added: int = 3


def test_a_field_of_a_later_layout_does_not_part_two_workers() -> None:
    def digest_of(layout: KVLayout) -> str:
        return compatibility_digest(
            numeric_profile="p", tokenizer_digest="t", layout=layout, rope="r"
        )

    values = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 8, "block_size": 16}
    seen = {digest_of(KVLayout(**values, dtype="bfloat16"))}
    assert digest_of(LaterLayout(**values, dtype="bfloat16", added=7)) in seen
    for name in values:
        seen.add(digest_of(KVLayout(**values | {name: values[name] * 2}, dtype="bfloat16")))
    seen.add(digest_of(KVLayout(**values, dtype="float16")))
    draft = KVLayout(**values, dtype="bfloat16")
    seen.add(digest_of(KVLayout(**values, dtype="bfloat16", draft=draft)))
    assert len(seen) == 7


def test_a_field_of_a_later_version_changes_no_digest() -> None:
    """The digests are of the fields that are listed, and stay from version to version."""
    config = tiny_config()
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    later = LaterConfig(**values | {"rope_scaling": LaterScaling()})
    assert config_digest(later) == config_digest(config) == "0286ca3e1af5456275f5d89b5489c8a7"
    assert gguf_fingerprint(later, "a") == gguf_fingerprint(config, "a")
    assert gguf_fingerprint(config, "a") == "0a0093f5ae188daab5199d3d561a1a0c"
