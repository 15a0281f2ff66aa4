"""The file of packed weights: made once, whole or not at all, with every tensor of the model."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from engine.checkpoint import packed
from engine.checkpoint.packed import pack_rows, packed_file, quantise, read_packed
from engine.checkpoint.source import Checkpoint, resolve
from engine.errors import CheckpointError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIPTYCH_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def checkpoint(cache: Path) -> Checkpoint:
    return resolve("smollm2", progress=False)


def test_the_default_model_keeps_its_own_types(checkpoint: Checkpoint) -> None:
    weights = read_packed(packed_file(checkpoint, "auto", progress=False), checkpoint.config)
    kinds = {name.rsplit(".", 1)[-1]: matrix.kind for name, matrix in weights.matrices.items()}
    assert kinds == {"qkv": "q4_1", "out": "q4_1", "gate_up": "q4_1", "down": "q4_1"} | {
        "embedding": "q8_0"
    }
    assert len(weights.matrices) == 4 * 30 + 1, "the tied head is the embedding"
    assert len(weights.vectors) == 2 * 30 + 1
    qkv = weights.matrices["7.qkv"]
    assert (qkv.rows, qkv.columns) == (960, 576)
    assert qkv.data.shape == (60, 576 // 32 * 320)


def test_it_is_made_once_however_many_ask(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    write = packed._write
    monkeypatch.setattr(packed, "_write", lambda *args: (made.append(1), write(*args)))
    ask = [
        threading.Thread(target=packed_file, args=(checkpoint, "auto"), kwargs={"progress": False})
        for _ in range(3)
    ]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join(60)
    assert made == [1]


def test_a_damaged_file_is_made_again(checkpoint: Checkpoint) -> None:
    path = packed_file(checkpoint, "auto", progress=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert packed_file(checkpoint, "auto", progress=False).read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_named(checkpoint: Checkpoint, cache: Path) -> None:
    (cache / "packed").write_text("in the way")
    with pytest.raises(CheckpointError, match="packed"):
        packed_file(checkpoint, "auto", progress=False)


def test_rows_are_padded_with_zeros_to_a_group() -> None:
    values = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    data = pack_rows("q8_0", quantise("q8_0", values))
    assert data.shape == (1, 2 * (32 + 512))
    body = data.reshape(2, 544)[:, 32:].reshape(2, 16, 16, 2)
    assert body[:, :, :5].any()
    assert not body[:, :, 5:].any()
